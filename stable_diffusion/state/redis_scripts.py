"""The Lua scripts of redis_jobs.py. Each runs as one step, by the store's clock.

All keys begin with KEYS[1], which holds a hash tag: in a cluster they lie on one node. For each job there is a hash with the fields of the
job and, behind the number of an image and a point, those of its images; and beside them

    unclaimed           images that no runner has yet, by the time at which their API worker was last heard of
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

from stable_diffusion.state.job_record import PICTURES_KEPT_S
from stable_diffusion.state.jobs import HELD_FOR_S, JOBS_REMEMBERED_S, MAX_ASYNCHRONOUS_JOBS

RUNNER_LEASE_S = 30  # after this silence a runner is considered dead
_JOBS_REMEMBERED = 50_000  # a job whose image is gone has about 1 KB
_GIVEN_UP_S = 10

# A script that frees memory, or needs hardly any, also runs when the store is full.
_ALWAYS = "#!lua flags=allow-oom\n"
_WITH_ROOM = "#!lua\n"

_COMMON = (
    f"""
local LEASE, HELD, KEPT, REMEMBERED_S = {RUNNER_LEASE_S}, {HELD_FOR_S}, {PICTURES_KEPT_S}, {JOBS_REMEMBERED_S}
local REMEMBERED, GIVEN_UP, MAX_JOBS = {_JOBS_REMEMBERED}, {_GIVEN_UP_S}, {MAX_ASYNCHRONOUS_JOBS}
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

-- Ends an image. A runner that did not end it itself is told to stop.
local function finish(id, index, state, outcome, is_given_up)
  local key, member = key_of(id), id .. ':' .. index
  if not is_unfinished(id, index) then return end
  local job = redis.call('HMGET', key, 'owner', 'asynchronous', index .. '.runner', index .. '.steps')
  local owner, runner = job[1], job[3]
  redis.call('HSET', key, index .. '.state', state, index .. '.outcome', outcome, index .. '.ended_at', stamp(NOW),
    index .. '.position', '0', index .. '.seconds_left', '0')
  if state == 'completed' then redis.call('HSET', key, index .. '.step', job[4]) end
  redis.call('HDEL', key, index .. '.preview')
  redis.call('ZREM', PREFIX .. 'unclaimed', member)
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
    redis.call('ZREM', PREFIX .. 'owner:' .. owner, id)
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

local function request_cancellation(id)
  for _, index in ipairs(images_of(id, true)) do
    redis.call('HSET', key_of(id), index .. '.cancel', '1')
    local runner = redis.call('HGET', key_of(id), index .. '.runner')
    if runner then redis.call('ZADD', PREFIX .. 'cancel:' .. runner, '+inf', id .. ':' .. index) end
  end
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

-- Fails the images of workers and runners that are silent. Silence counts only while somebody has been watching: after the store was away,
-- all of them are given the time to report again.
local function reap(outcome)
  for _, member in ipairs(redis.call('ZRANGEBYSCORE', PREFIX .. 'unclaimed', '-inf', NOW - HELD, 'LIMIT', 0, 100)) do
    local id, index = parts_of(member)
    finish(id, index, 'failed', outcome, true)
  end
  local watch = redis.call('HMGET', PREFIX .. 'watch', 'since_at', 'last_at')
  local since = tonumber(watch[1] or NOW)
  if NOW - tonumber(watch[2] or 0) > LEASE / 2 then since = NOW end
  redis.call('HSET', PREFIX .. 'watch', 'since_at', stamp(since), 'last_at', stamp(NOW))
  if NOW - since < LEASE then return end
  for _, runner in ipairs(redis.call('ZRANGEBYSCORE', PREFIX .. 'runners', '-inf', NOW - LEASE, 'LIMIT', 0, 10)) do
    for _, member in ipairs(redis.call('SMEMBERS', PREFIX .. 'runner:' .. runner)) do
      local id, index = parts_of(member)
      finish(id, index, 'failed', outcome, true)
    end
    redis.call('ZREM', PREFIX .. 'runners', runner)
  end
end

local function hear_of(runner)
  redis.call('ZADD', PREFIX .. 'runners', NOW, runner)
  redis.call('EXPIRE', PREFIX .. 'cancel:' .. runner, REMEMBERED_S)
end
"""
)

# id, index, owner, asynchronous, task, steps, runner
BEGIN = f"""{_WITH_ROOM}{_COMMON}
local id, index, runner = ARGV[1], ARGV[2], ARGV[7]
local key, member = key_of(id), id .. ':' .. index
if redis.call('HEXISTS', key, index .. '.task') == 0 then
  insert(id, index, ARGV[3], ARGV[4], ARGV[5], ARGV[6])
  if tonumber(redis.call('HGET', key, 'images') or 0) <= tonumber(index) then redis.call('HSET', key, 'images', index + 1) end
end
hear_of(runner)
redis.call('HSET', key, index .. '.runner', runner)
redis.call('ZREM', PREFIX .. 'unclaimed', member)
if is_unfinished(id, index) then
  redis.call('SADD', PREFIX .. 'runner:' .. runner, member)
  if redis.call('HEXISTS', key, index .. '.cancel') == 1 then redis.call('ZADD', PREFIX .. 'cancel:' .. runner, '+inf', member) end
elseif redis.call('HEXISTS', key, index .. '.given_up') == 1 then
  redis.call('ZADD', PREFIX .. 'cancel:' .. runner, NOW + GIVEN_UP, member)
end
"""

# for each image: id, index, state, position, step, steps, seconds left, preview or nothing
NOTE = f"""{_WITH_ROOM}{_COMMON}
for first = 1, #ARGV, 8 do
  local id, index = ARGV[first], ARGV[first + 1]
  if is_unfinished(id, index) then
    redis.call('HSET', key_of(id), index .. '.state', ARGV[first + 2], index .. '.position', ARGV[first + 3],
      index .. '.step', ARGV[first + 4], index .. '.steps', ARGV[first + 5], index .. '.seconds_left', ARGV[first + 6])
    if ARGV[first + 7] ~= '' then redis.call('HSET', key_of(id), index .. '.preview', ARGV[first + 7]) end
  end
end
"""

# id, index, state, outcome, most bytes of images
_END = f"""{_COMMON}
local id, index, picture = ARGV[1], ARGV[2], ARGV[6]
if not is_unfinished(id, index) then return 0 end
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
END_WITH_PICTURE = _WITH_ROOM + _END

# runner, outcome of jobs whose runner died
TO_CANCEL = f"""{_ALWAYS}{_COMMON}
hear_of(ARGV[1])
reap(ARGV[2])
redis.call('ZREMRANGEBYSCORE', PREFIX .. 'cancel:' .. ARGV[1], '-inf', NOW)
return redis.call('ZRANGE', PREFIX .. 'cancel:' .. ARGV[1], 0, -1)
"""

# runner, how the names of its predecessors begin, outcome of their jobs
REGISTER = f"""{_ALWAYS}{_COMMON}
for _, runner in ipairs(redis.call('ZRANGE', PREFIX .. 'runners', 0, -1)) do
  if string.sub(runner, 1, #ARGV[2]) == ARGV[2] then
    for _, member in ipairs(redis.call('SMEMBERS', PREFIX .. 'runner:' .. runner)) do
      local id, index = parts_of(member)
      finish(id, index, 'failed', ARGV[3], true)
    end
    redis.call('ZREM', PREFIX .. 'runners', runner)
  end
end
hear_of(ARGV[1])
"""

# id, owner, digest of the idempotency key or nothing, fingerprint, image format or nothing, outcome of jobs whose runner died;
# for each image: task, steps
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
reap(ARGV[6])
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
  local soonest
  for place = 1, #counts, 2 do
    for _, one in ipairs(redis.call('ZRANGE', PREFIX .. 'owner:' .. counts[place], 0, 99)) do
      if redis.call('HGET', key_of(one), 'asynchronous') == '1' then
        for _, index in ipairs(images_of(one, true)) do
          local left = tonumber(redis.call('HGET', key_of(one), index .. '.seconds_left') or nil)
          if left and (not soonest or left < soonest) then soonest = left end
        end
      end
    end
  end
  return {{'too many', tostring(unfinished), tostring(soonest or 1)}}
end
for place = 7, #ARGV, 2 do
  local index = tostring((place - 7) / 2)
  insert(id, index, owner, '1', ARGV[place], ARGV[place + 1])
  redis.call('ZADD', PREFIX .. 'unclaimed', NOW, id .. ':' .. index)
end
redis.call('HSET', key_of(id), 'images', (#ARGV - 6) / 2, 'image_format', ARGV[5])
if ARGV[3] ~= '' then
  redis.call('HSET', key, 'fingerprint', ARGV[4], 'job', id)
  redis.call('EXPIRE', key, REMEMBERED_S)
end
return {{'accepted'}}
"""

# id, outcome of jobs whose runner died. Returns the job's fields and, for each image that is kept, its index and its bytes.
GET = f"""{_ALWAYS}{_COMMON}
local id = ARGV[1]
reap(ARGV[2])
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

# id
CANCEL = f"""{_ALWAYS}{_COMMON}
request_cancellation(ARGV[1])
"""

# id
NOTE_HELD = f"""{_ALWAYS}{_COMMON}
for _, index in ipairs(images_of(ARGV[1], true)) do
  redis.call('ZADD', PREFIX .. 'unclaimed', 'XX', NOW, ARGV[1] .. ':' .. index)
end
"""

# owner, outcome of jobs whose runner died. Returns the id and the fields of each unfinished job.
OF_OWNER = f"""{_ALWAYS}{_COMMON}
reap(ARGV[2])
local found = {{}}
for _, id in ipairs(redis.call('ZRANGE', PREFIX .. 'owner:' .. ARGV[1], 0, -1)) do
  found[#found + 1] = {{id, redis.call('HGETALL', key_of(id))}}
end
return found
"""

# owner
CANCEL_OF_OWNER = f"""{_ALWAYS}{_COMMON}
for _, id in ipairs(redis.call('ZRANGE', PREFIX .. 'owner:' .. ARGV[1], 0, -1)) do request_cancellation(id) end
"""

# id, state, outcome, most bytes of images
ABANDON = f"""{_ALWAYS}{_COMMON}
for _, index in ipairs(images_of(ARGV[1], true)) do finish(ARGV[1], index, ARGV[2], ARGV[3], true) end
forget(tonumber(ARGV[4]))
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
