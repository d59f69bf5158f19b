"""The Lua scripts of redis_jobs.py. Each runs as one step, by the store's clock.

All keys begin with KEYS[1], which holds a hash tag: in a cluster they lie on one node. For each job there is a hash with the fields of the
job and, behind the number of an image and a point, those of its images; and beside them

    queue:OWNER         the jobs of a caller that no machine has taken, the oldest first
    callers             callers with such jobs, by the work that machines have taken of them
    taken_until         to how much work the caller had come whose job was taken last
    taken:OWNER         to how much a caller has come whose jobs have all been taken
    waiting_until       the jobs that no machine has taken, by their deadline
    unclaimed           images that a machine has taken and no runner has yet, by the time at which their API worker was last heard of
    machine:NAME        such images of a machine
    input:ID:INDEX      the image and the mask from which an unfinished image is made
    input_bytes         the sum of their bytes
    runners             runners by the time at which they were last heard of
    runner:NAME         the unfinished images of a runner
    cancel:NAME         its images that are to be cancelled, by the time until which the runner is told
    owner:NAME          the unfinished jobs of a caller, by age
    asynchronous        how many unfinished images of asynchronous jobs each caller has
    ended               jobs that have ended, by time
    picture:ID:INDEX    an image that is kept
    pictures            ID:INDEX:BYTES of the images that are kept, by time
    picture_bytes       the sum of their bytes
    key:DIGEST          the fingerprint and the job of an idempotency key
    watch               since when somebody has looked for silent runners, and when last
"""

from __future__ import annotations

from stable_diffusion.state.job_record import IMAGES_KEPT_S
from stable_diffusion.state.jobs import HELD_FOR_S, JOBS_REMEMBERED_S, MAX_ASYNCHRONOUS_JOBS

RUNNER_LEASE_S = 30  # after this silence a runner is considered dead
_JOBS_REMEMBERED = 20_000  # a job whose image is gone has some 6 KB (docs/scale.md)
_GIVEN_UP_S = 10
_MAX_REDRAWS = 2  # then the job fails: an image that ends its process must not end all of them
INPUT_BYTES = 256 << 20  # of all jobs that have not ended

# A script that frees memory, or needs hardly any, also runs when the store is full.
_ALWAYS = "#!lua flags=allow-oom\n"
_WITH_ROOM = "#!lua\n"

_COMMON = (
    f"""
local LEASE, HELD, KEPT, REMEMBERED_S = {RUNNER_LEASE_S}, {HELD_FOR_S}, {IMAGES_KEPT_S}, {JOBS_REMEMBERED_S}
local REMEMBERED, GIVEN_UP, MAX_JOBS = {_JOBS_REMEMBERED}, {_GIVEN_UP_S}, {MAX_ASYNCHRONOUS_JOBS}
local MAX_REDRAWS, INPUT_BYTES = {_MAX_REDRAWS}, {INPUT_BYTES}
"""
    + """
local PREFIX = KEYS[1]
local clock = redis.call('TIME')
local NOW = tonumber(clock[1]) + tonumber(clock[2]) / 1000000

local function stamp(seconds) return string.format('%.6f', seconds) end
local function key_of(id) return PREFIX .. 'job:' .. id end
local function parts_of(member) return string.match(member, '^(.*):(%d+)$') end

local function insert(id, index, owner, asynchronous, task, steps)
  local key = key_of(id)
  redis.call('HSET', key, 'owner', owner, 'asynchronous', asynchronous, index .. '.task', task, index .. '.state', 'queued',
    index .. '.position', '1', index .. '.step', '0', index .. '.steps', steps, index .. '.created_at', stamp(NOW))
  redis.call('PERSIST', key)
  redis.call('HINCRBY', key, 'unfinished', 1)
  redis.call('ZADD', PREFIX .. 'owner:' .. owner, 'NX', NOW, id)
  if asynchronous == '1' then redis.call('HINCRBY', PREFIX .. 'asynchronous', owner, 1) end
end

local function is_unfinished(id, index)
  local known = redis.call('HMGET', key_of(id), index .. '.task', index .. '.ended_at')
  return known[1] and not known[2]
end

local function take_out_of_queue(id, owner)
  redis.call('LREM', PREFIX .. 'queue:' .. owner, 1, id)
  redis.call('ZREM', PREFIX .. 'waiting_until', id)
  if redis.call('EXISTS', PREFIX .. 'queue:' .. owner) == 0 then
    local taken = redis.call('ZSCORE', PREFIX .. 'callers', owner)
    if taken then redis.call('SET', PREFIX .. 'taken:' .. owner, taken, 'EX', REMEMBERED_S) end
    redis.call('ZREM', PREFIX .. 'callers', owner)
  end
end

-- Puts a job behind the caller's others, or first if it was taken before. A caller that had nothing waiting begins where the others are.
local function put_into_queue(id, owner, is_first)
  redis.call(is_first and 'LPUSH' or 'RPUSH', PREFIX .. 'queue:' .. owner, id)
  redis.call('ZADD', PREFIX .. 'waiting_until', redis.call('HGET', key_of(id), 'deadline_at'), id)
  if not redis.call('ZSCORE', PREFIX .. 'callers', owner) then
    local level = tonumber(redis.call('GET', PREFIX .. 'taken_until') or 0)
    local taken = tonumber(redis.call('GET', PREFIX .. 'taken:' .. owner) or 0)
    redis.call('ZADD', PREFIX .. 'callers', math.max(level, taken), owner)
  end
end

local function leave_machine(key, index, member)
  redis.call('ZREM', PREFIX .. 'unclaimed', member)
  local machine = redis.call('HGET', key, index .. '.machine')
  if machine then redis.call('SREM', PREFIX .. 'machine:' .. machine, member) end
end

local function drop_input(member)
  local input = PREFIX .. 'input:' .. member
  local bytes = redis.call('HSTRLEN', input, 'image') + redis.call('HSTRLEN', input, 'mask')
  if bytes > 0 then
    redis.call('UNLINK', input)
    redis.call('DECRBY', PREFIX .. 'input_bytes', bytes)
  end
end

-- Ends an image. A runner that did not end it itself is told to stop.
local function finish(id, index, state, outcome, is_given_up)
  local key, member = key_of(id), id .. ':' .. index
  if not is_unfinished(id, index) then return end
  local job = redis.call('HMGET', key, 'owner', 'asynchronous', index .. '.runner', index .. '.steps')
  local owner, runner = job[1], job[3]
  redis.call('HSET', key, index .. '.state', state, index .. '.outcome', outcome, index .. '.ended_at', stamp(NOW),
    index .. '.position', '0', index .. '.seconds_left', '0')
  if state == 'completed' then redis.call('HSET', key, index .. '.step', job[4]) end
  redis.call('HDEL', key, index .. '.preview', index .. '.waits')
  leave_machine(key, index, member)
  drop_input(member)
  if runner then
    redis.call('SREM', PREFIX .. 'runner:' .. runner, member)
    redis.call('ZREM', PREFIX .. 'cancel:' .. runner, member)
    if is_given_up then redis.call('ZADD', PREFIX .. 'cancel:' .. runner, NOW + GIVEN_UP, member) end
  elseif is_given_up then
    redis.call('HSET', key, index .. '.given_up', '1')
  end
  if job[2] == '1' and redis.call('HINCRBY', PREFIX .. 'asynchronous', owner, -1) <= 0 then
    redis.call('HDEL', PREFIX .. 'asynchronous', owner)
  end
  if redis.call('HINCRBY', key, 'unfinished', -1) <= 0 then
    take_out_of_queue(id, owner)
    redis.call('ZREM', PREFIX .. 'owner:' .. owner, id)
    redis.call('HDEL', key, 'key_name', 'client_address')
    redis.call('ZADD', PREFIX .. 'ended', NOW, id)
    redis.call('EXPIRE', key, REMEMBERED_S)
  end
end

-- The indices of a job's images, or only of those that have not ended.
local function images_of(id, only_unfinished)
  local found = {}
  for index = 0, tonumber(redis.call('HGET', key_of(id), 'images') or 0) - 1 do
    local known = redis.call('HMGET', key_of(id), index .. '.task', index .. '.ended_at')
    if known[1] and not (only_unfinished and known[2]) then found[#found + 1] = tostring(index) end
  end
  return found
end

-- A job that no machine has taken ends at once.
local function request_cancellation(id, outcome)
  local is_waiting = redis.call('ZSCORE', PREFIX .. 'waiting_until', id)
  for _, index in ipairs(images_of(id, true)) do
    redis.call('HSET', key_of(id), index .. '.cancel', '1')
    local runner = redis.call('HGET', key_of(id), index .. '.runner')
    if is_waiting then
      finish(id, index, 'cancelled', outcome, true)
    elseif runner then
      redis.call('ZADD', PREFIX .. 'cancel:' .. runner, '+inf', id .. ':' .. index)
    end
  end
end

-- Ends what a runner or a machine has lost, or puts it back for others. The number of the attempt grows, so that whatever the old one still
-- says is refused.
local function lose(id, index, is_redraw, outcome, outcome_of_cancelled)
  local key, member = key_of(id), id .. ':' .. index
  if not is_unfinished(id, index) then return end
  local job = redis.call('HMGET', key, 'owner', 'deadline_at', index .. '.runner', index .. '.cancel')
  if not job[2] then return finish(id, index, 'failed', outcome, true) end
  local redraws = redis.call('HINCRBY', key, index .. '.redraws', is_redraw and 1 or 0)
  if job[4] then return finish(id, index, 'cancelled', outcome_of_cancelled, true) end
  if redraws > MAX_REDRAWS then return finish(id, index, 'failed', outcome, true) end
  leave_machine(key, index, member)
  if job[3] then
    redis.call('SREM', PREFIX .. 'runner:' .. job[3], member)
    redis.call('ZADD', PREFIX .. 'cancel:' .. job[3], NOW + GIVEN_UP, member)
  end
  redis.call('HINCRBY', key, index .. '.attempt', 1)
  redis.call('HDEL', key, index .. '.runner', index .. '.preview', index .. '.seconds_left')
  redis.call('HSET', key, index .. '.state', 'queued', index .. '.position', '1', index .. '.step', '0', index .. '.waits', '1')
  if not redis.call('ZSCORE', PREFIX .. 'waiting_until', id) then put_into_queue(id, job[1], true) end
end

-- Deletes images after their time, and the oldest beyond so many bytes; and the jobs that have ended first beyond their number.
local function forget(most_bytes)
  for _ = 1, 100 do
    local oldest = redis.call('ZRANGE', PREFIX .. 'pictures', 0, 0, 'WITHSCORES')
    if not oldest[1] then break end
    if tonumber(oldest[2]) > NOW - KEPT and tonumber(redis.call('GET', PREFIX .. 'picture_bytes') or 0) <= most_bytes then break end
    local member, bytes = parts_of(oldest[1])
    redis.call('ZREM', PREFIX .. 'pictures', oldest[1])
    redis.call('UNLINK', PREFIX .. 'picture:' .. member)
    redis.call('DECRBY', PREFIX .. 'picture_bytes', bytes)
  end
  redis.call('ZREMRANGEBYSCORE', PREFIX .. 'ended', '-inf', NOW - REMEMBERED_S)
  for _ = 1, math.min(100, redis.call('ZCARD', PREFIX .. 'ended') - REMEMBERED) do
    local id = redis.call('ZPOPMIN', PREFIX .. 'ended')[1]
    if tonumber(redis.call('HGET', key_of(id), 'unfinished') or 0) <= 0 then redis.call('UNLINK', key_of(id)) end
  end
end

-- Ends jobs that no machine has taken in their time, and takes the images of workers and runners that are silent away from them. Silence
-- counts only while somebody has been watching: after the store was away, all of them are given the time to report again. Once a second is
-- enough, and calls that only look then write nothing into the append-only file.
local function reap(outcome, outcome_of_cancelled, outcome_of_late)
  local watch = redis.call('HMGET', PREFIX .. 'watch', 'since_at', 'last_at')
  local since, last = tonumber(watch[1] or NOW), tonumber(watch[2] or 0)
  if NOW - last < 1 then return end
  for _, id in ipairs(redis.call('ZRANGEBYSCORE', PREFIX .. 'waiting_until', '-inf', NOW, 'LIMIT', 0, 100)) do
    for _, index in ipairs(images_of(id, true)) do
      if redis.call('HEXISTS', key_of(id), index .. '.waits') == 1 then finish(id, index, 'failed', outcome_of_late, true) end
    end
    take_out_of_queue(id, redis.call('HGET', key_of(id), 'owner') or '')
  end
  for _, member in ipairs(redis.call('ZRANGEBYSCORE', PREFIX .. 'unclaimed', '-inf', NOW - HELD, 'LIMIT', 0, 100)) do
    local id, index = parts_of(member)
    lose(id, index, false, outcome, outcome_of_cancelled)
    redis.call('ZREM', PREFIX .. 'unclaimed', member)
  end
  if NOW - last > LEASE / 2 then since = NOW end
  redis.call('HSET', PREFIX .. 'watch', 'since_at', stamp(since), 'last_at', stamp(NOW))
  if NOW - since < LEASE then return end
  for _, runner in ipairs(redis.call('ZRANGEBYSCORE', PREFIX .. 'runners', '-inf', NOW - LEASE, 'LIMIT', 0, 10)) do
    for _, member in ipairs(redis.call('SMEMBERS', PREFIX .. 'runner:' .. runner)) do
      local id, index = parts_of(member)
      lose(id, index, true, outcome, outcome_of_cancelled)
    end
    redis.call('ZREM', PREFIX .. 'runners', runner)
  end
end

local function hear_of(runner)
  if NOW - tonumber(redis.call('ZSCORE', PREFIX .. 'runners', runner) or 0) < 1 then return end
  redis.call('ZADD', PREFIX .. 'runners', NOW, runner)
  redis.call('EXPIRE', PREFIX .. 'cancel:' .. runner, REMEMBERED_S)
end
"""
)

# id, index, owner, asynchronous, task, steps, runner, attempt
BEGIN = f"""{_WITH_ROOM}{_COMMON}
local id, index, runner = ARGV[1], ARGV[2], ARGV[7]
local key, member = key_of(id), id .. ':' .. index
if redis.call('HEXISTS', key, index .. '.task') == 0 then
  insert(id, index, ARGV[3], ARGV[4], ARGV[5], ARGV[6])
  if tonumber(redis.call('HGET', key, 'images') or 0) <= tonumber(index) then redis.call('HSET', key, 'images', index + 1) end
end
hear_of(runner)
if ARGV[8] ~= (redis.call('HGET', key, index .. '.attempt') or '0') then
  redis.call('ZADD', PREFIX .. 'cancel:' .. runner, NOW + GIVEN_UP, member)
  return
end
redis.call('HSET', key, index .. '.runner', runner)
redis.call('ZREM', PREFIX .. 'cancel:' .. runner, member)
leave_machine(key, index, member)
if redis.call('HDEL', key, index .. '.waits') == 1 then take_out_of_queue(id, ARGV[3]) end
if is_unfinished(id, index) then
  redis.call('SADD', PREFIX .. 'runner:' .. runner, member)
  if redis.call('HEXISTS', key, index .. '.cancel') == 1 then redis.call('ZADD', PREFIX .. 'cancel:' .. runner, '+inf', member) end
elseif redis.call('HEXISTS', key, index .. '.given_up') == 1 then
  redis.call('ZADD', PREFIX .. 'cancel:' .. runner, NOW + GIVEN_UP, member)
end
"""

# for each image: id, index, state, position, step, steps, seconds left, preview or nothing, attempt
NOTE = f"""{_WITH_ROOM}{_COMMON}
for first = 1, #ARGV, 9 do
  local id, index = ARGV[first], ARGV[first + 1]
  if is_unfinished(id, index) and ARGV[first + 8] == (redis.call('HGET', key_of(id), index .. '.attempt') or '0') then
    redis.call('HSET', key_of(id), index .. '.state', ARGV[first + 2], index .. '.position', ARGV[first + 3],
      index .. '.step', ARGV[first + 4], index .. '.steps', ARGV[first + 5], index .. '.seconds_left', ARGV[first + 6])
    if ARGV[first + 7] ~= '' then redis.call('HSET', key_of(id), index .. '.preview', ARGV[first + 7]) end
  end
end
"""

# id, index, state, outcome, most bytes of images, attempt
_END = f"""{_COMMON}
local id, index, picture = ARGV[1], ARGV[2], ARGV[7]
if not is_unfinished(id, index) or ARGV[6] ~= (redis.call('HGET', key_of(id), index .. '.attempt') or '0') then return 0 end
finish(id, index, ARGV[3], ARGV[4], false)
if picture then
  redis.call('SET', PREFIX .. 'picture:' .. id .. ':' .. index, picture, 'EX', KEPT)
  redis.call('ZADD', PREFIX .. 'pictures', NOW, id .. ':' .. index .. ':' .. #picture)
  redis.call('INCRBY', PREFIX .. 'picture_bytes', #picture)
end
forget(tonumber(ARGV[5]))
return 1
"""
END = _ALWAYS + _END
# the same, and the image
END_WITH_IMAGE = _WITH_ROOM + _END

# runner, outcomes
TO_CANCEL = f"""{_ALWAYS}{_COMMON}
hear_of(ARGV[1])
reap(ARGV[2], ARGV[3], ARGV[4])
redis.call('ZREMRANGEBYSCORE', PREFIX .. 'cancel:' .. ARGV[1], '-inf', NOW)
return redis.call('ZRANGE', PREFIX .. 'cancel:' .. ARGV[1], 0, -1)
"""

# runner, how the names of its predecessors begin, outcomes
REGISTER = f"""{_ALWAYS}{_COMMON}
for _, runner in ipairs(redis.call('ZRANGE', PREFIX .. 'runners', 0, -1)) do
  if string.sub(runner, 1, #ARGV[2]) == ARGV[2] then
    for _, member in ipairs(redis.call('SMEMBERS', PREFIX .. 'runner:' .. runner)) do
      local id, index = parts_of(member)
      lose(id, index, true, ARGV[3], ARGV[4])
    end
    redis.call('ZREM', PREFIX .. 'runners', runner)
  end
end
hear_of(ARGV[1])
"""

# id, owner, digest of the idempotency key or nothing, fingerprint, image format or nothing, outcomes, seconds until the deadline, work,
# for the request log the name of the caller's API key or nothing and the caller's address or nothing; for each image: task, steps, input
# image or nothing, mask or nothing
ACCEPT = f"""{_WITH_ROOM}{_COMMON}
local id, owner, key = ARGV[1], ARGV[2], PREFIX .. 'key:' .. ARGV[3]
local function is_of_use(known)
  if redis.call('EXISTS', key_of(known)) == 0 then return false end
  for _, index in ipairs(images_of(known)) do
    if not is_unfinished(known, index) and redis.call('EXISTS', PREFIX .. 'picture:' .. known .. ':' .. index) == 0 then return false end
  end
  return true
end
if ARGV[3] ~= '' then
  local known = redis.call('HMGET', key, 'fingerprint', 'job')
  if known[2] and is_of_use(known[2]) then
    if known[1] ~= ARGV[4] then return {{'mismatch'}} end
    return {{'known', known[2]}}
  end
end
reap(ARGV[6], ARGV[7], ARGV[8])
local counts = redis.call('HGETALL', PREFIX .. 'asynchronous')
local unfinished, owners, owned = 0, #counts / 2, 0
for place = 1, #counts, 2 do
  unfinished = unfinished + tonumber(counts[place + 1])
  if counts[place] == owner then owned = tonumber(counts[place + 1]) end
end
if owned == 0 then owners = owners + 1 end
local limit = MAX_JOBS * math.max(1, redis.call('ZCARD', PREFIX .. 'runners'))
-- The same rule as core/fair_share.py.
if unfinished >= limit and not (owned < limit / owners and unfinished < 2 * limit) then
  local soonest  -- of the caller's own oldest jobs: to look at all would cost more than to accept one
  for _, one in ipairs(redis.call('ZRANGE', PREFIX .. 'owner:' .. owner, 0, 9)) do
    for _, index in ipairs(images_of(one, true)) do
      local left = tonumber(redis.call('HGET', key_of(one), index .. '.seconds_left') or nil)
      if left and (not soonest or left < soonest) then soonest = left end
    end
  end
  return {{'too many', tostring(unfinished), tostring(soonest or 1)}}
end
local bytes = 0
for place = 13, #ARGV, 4 do bytes = bytes + #ARGV[place + 2] + #ARGV[place + 3] end
if tonumber(redis.call('GET', PREFIX .. 'input_bytes') or 0) + bytes > INPUT_BYTES then return {{'no room'}} end
redis.call('INCRBY', PREFIX .. 'input_bytes', bytes)
for place = 13, #ARGV, 4 do
  local index = tostring((place - 13) / 4)
  insert(id, index, owner, '1', ARGV[place], ARGV[place + 1])
  redis.call('HSET', key_of(id), index .. '.waits', '1')
  local input = PREFIX .. 'input:' .. id .. ':' .. index
  if ARGV[place + 2] ~= '' then redis.call('HSET', input, 'image', ARGV[place + 2]) end
  if ARGV[place + 3] ~= '' then redis.call('HSET', input, 'mask', ARGV[place + 3]) end
end
redis.call('HSET', key_of(id), 'images', (#ARGV - 12) / 4, 'image_format', ARGV[5], 'deadline_at', stamp(NOW + ARGV[9]),
  'work', ARGV[10], 'key_name', ARGV[11], 'client_address', ARGV[12])
put_into_queue(id, owner, false)
if ARGV[3] ~= '' then
  redis.call('HSET', key, 'fingerprint', ARGV[4], 'job', id)
  redis.call('EXPIRE', key, REMEMBERED_S)
end
return {{'accepted'}}
"""

# id, outcomes. Returns the job's fields and, for each image that is kept, its index and its bytes.
GET = f"""{_ALWAYS}{_COMMON}
local id = ARGV[1]
reap(ARGV[2], ARGV[3], ARGV[4])
local fields = redis.call('HGETALL', key_of(id))
local pictures = {{}}
if redis.call('HGET', key_of(id), 'asynchronous') == '1' then
  for _, index in ipairs(images_of(id)) do
    local picture = redis.call('GET', PREFIX .. 'picture:' .. id .. ':' .. index)
    if picture then pictures[#pictures + 1] = index; pictures[#pictures + 1] = picture end
  end
end
return {{fields, pictures}}
"""

# id, outcome
CANCEL = f"""{_ALWAYS}{_COMMON}
request_cancellation(ARGV[1], ARGV[2])
"""

# id
NOTE_HELD = f"""{_ALWAYS}{_COMMON}
for _, index in ipairs(images_of(ARGV[1], true)) do
  redis.call('ZADD', PREFIX .. 'unclaimed', 'XX', NOW, ARGV[1] .. ':' .. index)
end
"""

# owner, outcomes. Returns the id and the fields of each unfinished job.
OF_OWNER = f"""{_ALWAYS}{_COMMON}
reap(ARGV[2], ARGV[3], ARGV[4])
local found = {{}}
for _, id in ipairs(redis.call('ZRANGE', PREFIX .. 'owner:' .. ARGV[1], 0, -1)) do
  found[#found + 1] = {{id, redis.call('HGETALL', key_of(id))}}
end
return found
"""

# owner, outcome
CANCEL_OF_OWNER = f"""{_ALWAYS}{_COMMON}
for _, id in ipairs(redis.call('ZRANGE', PREFIX .. 'owner:' .. ARGV[1], 0, -1)) do request_cancellation(id, ARGV[2]) end
"""

# id, state, outcome, most bytes of images, attempt or nothing for any
ABANDON = f"""{_ALWAYS}{_COMMON}
for _, index in ipairs(images_of(ARGV[1], true)) do
  if ARGV[5] == '' or ARGV[5] == (redis.call('HGET', key_of(ARGV[1]), index .. '.attempt') or '0') then
    finish(ARGV[1], index, ARGV[2], ARGV[3], true)
  end
end
forget(tonumber(ARGV[4]))
"""

# machine, how many unfinished images it may have, outcomes. Returns nothing, or of the job that is taken: id, owner, seconds until its
# deadline, the name of the caller's key, the caller's address and, for each of its images that nobody generates, index, task, attempt,
# input image or nothing, mask or nothing.
TAKE = f"""{_ALWAYS}{_COMMON}
local machine = ARGV[1]
reap(ARGV[3], ARGV[4], ARGV[5])
local busy = redis.call('SCARD', PREFIX .. 'machine:' .. machine)
for _, runner in ipairs(redis.call('ZRANGE', PREFIX .. 'runners', 0, -1)) do
  if string.sub(runner, 1, #machine + 1) == machine .. '/' then busy = busy + redis.call('SCARD', PREFIX .. 'runner:' .. runner) end
end
if busy >= tonumber(ARGV[2]) then return end
local caller = redis.call('ZRANGE', PREFIX .. 'callers', 0, 0, 'WITHSCORES')
if not caller[1] then return end
local owner, level = caller[1], tonumber(caller[2])
local id = redis.call('LINDEX', PREFIX .. 'queue:' .. owner, 0)
local key = key_of(id)
redis.call('SET', PREFIX .. 'taken_until', level)
redis.call('ZINCRBY', PREFIX .. 'callers', redis.call('HGET', key, 'work') or 0, owner)
take_out_of_queue(id, owner)
local job = redis.call('HMGET', key, 'deadline_at', 'key_name', 'client_address')
local taken = {{id, owner, stamp(tonumber(job[1] or NOW) - NOW), job[2] or '', job[3] or ''}}
for _, index in ipairs(images_of(id, true)) do
  local member = id .. ':' .. index
  if redis.call('HDEL', key, index .. '.waits') == 1 then
    redis.call('ZADD', PREFIX .. 'unclaimed', NOW, member)
    redis.call('HSET', key, index .. '.machine', machine)
    redis.call('SADD', PREFIX .. 'machine:' .. machine, member)
    local input = redis.call('HMGET', PREFIX .. 'input:' .. member, 'image', 'mask')
    taken[#taken + 1] = index
    taken[#taken + 1] = redis.call('HGET', key, index .. '.task')
    taken[#taken + 1] = redis.call('HGET', key, index .. '.attempt') or '0'
    taken[#taken + 1] = input[1] or ''
    taken[#taken + 1] = input[2] or ''
  end
end
return taken
"""

# id, index, attempt, whether that counts as a redraw, outcomes
GIVE_BACK = f"""{_ALWAYS}{_COMMON}
if ARGV[3] == (redis.call('HGET', key_of(ARGV[1]), ARGV[2] .. '.attempt') or '0') then
  lose(ARGV[1], ARGV[2], ARGV[4] == '1', ARGV[5], ARGV[6])
end
"""

# Returns the work of the jobs that no machine has taken, and how many runners are heard of.
WAITING = f"""{_ALWAYS}
local PREFIX, work = KEYS[1], 0
for _, id in ipairs(redis.call('ZRANGE', PREFIX .. 'waiting_until', 0, -1)) do
  work = work + tonumber(redis.call('HGET', PREFIX .. 'job:' .. id, 'work') or 0)
end
local now = tonumber(redis.call('TIME')[1])
return {{string.format('%.0f', work), redis.call('ZCOUNT', PREFIX .. 'runners', now - {RUNNER_LEASE_S}, '+inf')}}
"""

# KEYS[1]: the caller's key. Seconds of each request, and how many may be unpaid. Returns the seconds to wait.
COUNT_REQUEST = """#!lua
local clock = redis.call('TIME')
local now = tonumber(clock[1]) + tonumber(clock[2]) / 1000000
local interval, burst = tonumber(ARGV[1]), tonumber(ARGV[2])
local paid_off = math.max(now, tonumber(redis.call('GET', KEYS[1]) or 0)) + interval
local wait = paid_off - now - burst
if wait > interval / 1000 then return string.format('%.6f', wait) end  -- more than the rounding error of sums of fractions
redis.call('SET', KEYS[1], string.format('%.6f', paid_off), 'PX', math.ceil((paid_off - now) * 1000))
return '0'
"""
