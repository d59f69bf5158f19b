#!/usr/bin/env bash
# The commands of the image server's systemd units: prepare, run, wait, stop, report, watch.
# Its settings are in /etc/stable-diffusion. It logs to the journal and to CloudWatch, stream INSTANCE/boot. `bentoctl apply`
# follows that stream until a line begins with READY or FAILED.
set -euo pipefail

CONTAINER=stable-diffusion
# systemd sets both, from ConfigurationDirectory= and RuntimeDirectory=.
: "${CONFIGURATION_DIRECTORY:?}" "${RUNTIME_DIRECTORY:?}"
# In memory only: docker stores the registry's password here.
export DOCKER_CONFIG=$RUNTIME_DIRECTORY/docker

# shellcheck source=/dev/null
source "$CONFIGURATION_DIRECTORY/settings"
: "${REGION:?}" "${IMAGE:?}" "${LOG_GROUP:?}" "${PORT:?}" "${ENABLE_GPUS:?}" "${MINIMUM_DRIVER_MAJOR:?}" "${STOP_TIMEOUT_S:?}"
: "${API_KEY_ARN?}" "${IDLE_STOP_MINUTES:?}" "${AUTO_SCALING_GROUP?}" "${METRIC_NAMESPACE:?}" "${BACKLOG_METRIC:?}" "${BUSY_METRIC:?}"
: "${READY_HOOK:?}" "${LEAVE_HOOK:?}" "${READY_TIMEOUT_S:?}" "${KEEP_ALIVE_S:?}" "${STORE_ADDRESS?}" "${STORE_PASSWORD_ARN?}"
export AWS_REGION=$REGION AWS_DEFAULT_REGION=$REGION AWS_RETRY_MODE=standard AWS_MAX_ATTEMPTS=3
INSTANCE=$(cloud-init query instance_id)
# A machine without internet access must not waste time on logging to CloudWatch.
QUICKLY=(--cli-connect-timeout 5 --cli-read-timeout 10)
METADATA=http://169.254.169.254/latest

say() {
  local message
  # JSON allows neither control characters nor incomplete UTF-8 sequences.
  message=$(printf '%s' "$*" | tr '\000-\037\177' ' ' | iconv -c -f utf-8 -t utf-8)
  echo "$message"
  message=${message//\\/\\\\}
  message=${message//\"/\\\"}
  aws logs create-log-stream "${QUICKLY[@]}" --log-group-name "$LOG_GROUP" --log-stream-name "$INSTANCE/boot" >/dev/null 2>&1 || true # exists already
  aws logs put-log-events "${QUICKLY[@]}" --log-group-name "$LOG_GROUP" --log-stream-name "$INSTANCE/boot" \
    --log-events "[{\"timestamp\": $(date +%s%3N), \"message\": \"$message\"}]" >/dev/null ||
    echo "(CloudWatch did not accept that line)"
}

fail() {
  say "FAILED: $*"
  # Tells `report` not to log it again.
  touch "$RUNTIME_DIRECTORY/reported"
  exit 1
}

# retry TIMES COMMAND...: run the command up to TIMES times, with pauses of 5, 10, 20, ... seconds.
retry() {
  local times=$1 try pause=5
  shift
  for ((try = 1; try <= times; try++)); do
    "$@" && return
    if ((try < times)); then
      echo "attempt $try of $times failed: $*" >&2
      sleep "$pause"
      pause=$((pause * 2))
    fi
  done
  return 1
}

prepare() {
  mkdir -p "$DOCKER_CONFIG"
  rm -f "$RUNTIME_DIRECTORY/reported"
  date +%s >"$RUNTIME_DIRECTORY/began"
  say "starting on $INSTANCE: $IMAGE"
  if [[ $ENABLE_GPUS == true ]]; then check_driver; fi
  docker rm --force "$CONTAINER" >/dev/null 2>&1 || true # none exists after a clean stop
  if ! docker image inspect "$IMAGE" >/dev/null 2>&1; then pull; fi
  if [[ $ENABLE_GPUS == true ]]; then check_runtime; fi
  fetch_secrets
}

check_driver() {
  local found driver
  found=$(nvidia-smi --query-gpu=name,driver_version --format=csv,noheader 2>&1) ||
    fail "no NVIDIA GPU, or no driver for it: nvidia-smi printed: ${found:-nothing}. Use an instance type with an NVIDIA GPU and an AMI with its driver"
  driver=$(head -n 1 <<<"$found" | sed 's/.*, *//')
  if ((${driver%%.*} < MINIMUM_DRIVER_MAJOR)); then
    fail "the AMI's NVIDIA driver is $driver, but torch's CUDA needs $MINIMUM_DRIVER_MAJOR or newer: use a newer ami_id, or leave it out"
  fi
  say "GPU: $(paste -sd ';' <<<"$found")"
}

log_in() {
  aws ecr get-login-password | docker login --username AWS --password-stdin "${IMAGE%%/*}" >/dev/null
}

pull() {
  local began=$SECONDS
  say "pulling the image, which takes minutes"
  retry 5 log_in || fail "login to ${IMAGE%%/*} failed: check that spec.region is the image's region and that the machine has internet access"
  retry 5 docker pull --quiet "$IMAGE" || fail "the image $IMAGE could not be pulled: is it in the repository, and is the disk large enough? $(df -h / | tail -n 1)"
  say "pulled in $((SECONDS - began)) s"
}

check_runtime() {
  local answer
  answer=$(docker run --rm --gpus all --network none --entrypoint nvidia-smi "$IMAGE" -L 2>&1) ||
    fail "the container sees no GPU (NVIDIA container toolkit): $(tail -n 3 <<<"$answer")"
}

# read_secret ARN: in the region that the ARN names.
read_secret() {
  local region
  region=$(cut -d : -f 4 <<<"$1")
  case $1 in
    *:secretsmanager:*) aws secretsmanager get-secret-value --region "$region" --secret-id "$1" --query SecretString --output text ;;
    *) aws ssm get-parameter --region "$region" --with-decryption --name "$1" --query Parameter.Value --output text ;;
  esac
}

# Writes the secret part of the container's environment into memory, for docker's --env-file only.
fetch_secrets() {
  local key="" password="" secrets=""
  if [[ -n $API_KEY_ARN ]]; then
    key=$(retry 3 read_secret "$API_KEY_ARN") || fail "the API key could not be read from $API_KEY_ARN"
    if [[ -z $key ]]; then fail "the API key at $API_KEY_ARN is empty"; fi
    if [[ $key == *$'\n'* ]]; then fail "the API key at $API_KEY_ARN has more than one line; separate several keys with commas"; fi
    secrets+="SD_API_KEYS=$key"$'\n'
  fi
  if [[ -n $STORE_ADDRESS ]]; then
    password=$(retry 3 read_secret "$STORE_PASSWORD_ARN") || fail "the password of the Valkey could not be read from $STORE_PASSWORD_ARN"
    # Other characters would have to be encoded in a URL.
    if [[ ! $password =~ ^[A-Za-z0-9]+$ ]]; then fail "the password of the Valkey at $STORE_PASSWORD_ARN must consist of letters and digits"; fi
    secrets+="SD_SHARED_STATE=rediss://:$password@$STORE_ADDRESS"$'\n'
  fi
  (umask 077 && printf '%s' "$secrets" >"$RUNTIME_DIRECTORY/secrets")
}

run() {
  local gpus=()
  if [[ $ENABLE_GPUS == true ]]; then gpus=(--gpus all); fi
  exec docker run --name "$CONTAINER" "${gpus[@]}" \
    --publish "$PORT:3000" \
    --env-file "$CONFIGURATION_DIRECTORY/environment" --env-file "$RUNTIME_DIRECTORY/secrets" \
    --cap-drop ALL --security-opt no-new-privileges --pids-limit 4096 \
    --stop-timeout "$STOP_TIMEOUT_S" \
    --log-driver awslogs --log-opt "awslogs-region=$REGION" --log-opt "awslogs-group=$LOG_GROUP" \
    --log-opt "awslogs-stream=$INSTANCE/container" --log-opt mode=non-blocking --log-opt max-buffer-size=4m \
    "$IMAGE" serve --timeout-keep-alive "$KEEP_ALIVE_S"
}

# Exits with 1 when the container has ended, because systemd does not stop this command then. `report` logs the reason.
wait_until_ready() {
  local began
  : "${MAINPID:?}" # set by systemd: the process id of docker run
  began=$(<"$RUNTIME_DIRECTORY/began")
  until is_ready; do
    kill -0 "$MAINPID" 2>/dev/null || exit 1
    if (($(date +%s) - began > READY_TIMEOUT_S)); then
      fail "the server is not ready after $READY_TIMEOUT_S s; its last lines: $(last_lines)"
    fi
    sleep 2
  done
  say "READY after $(($(date +%s) - began)) s"
  if [[ -n $AUTO_SCALING_GROUP ]]; then join_group; fi
}

is_ready() {
  curl --silent --fail --max-time 5 "http://127.0.0.1:$PORT/readyz" >/dev/null
}

# Lets a new machine join its group. After a reboot AWS refuses this, because there is no launch to complete; that is not an error.
join_group() {
  local answer
  answer=$(retry 5 complete "$READY_HOOK" 2>&1) || say "the machine could not join its group: $(tail -n 2 <<<"$answer")"
}

# Whether the group is ending this machine.
is_leaving() {
  local token
  token=$(curl --silent --fail --max-time 5 --request PUT --header "X-aws-ec2-metadata-token-ttl-seconds: 60" "$METADATA/api/token") &&
    [[ $(curl --silent --fail --max-time 5 --header "X-aws-ec2-metadata-token: $token" \
      "$METADATA/meta-data/autoscaling/target-lifecycle-state") == Terminated ]]
}

# Finishes what the server has accepted, which may take up to STOP_TIMEOUT_S, and then lets the group end the machine. Until that has
# happened `watch` does it again every minute: AWS knows of no action to complete while the load balancer still waits for requests.
leave_group() {
  local answer
  if [[ ! -e $RUNTIME_DIRECTORY/left ]]; then
    say "leaving the group: finishing what was accepted"
    sleep 30 # by then the load balancer sends nothing more
    systemctl stop stable-diffusion.service
    say "leaving the group: finished"
    touch "$RUNTIME_DIRECTORY/left"
  fi
  answer=$(retry 5 complete "$LEAVE_HOOK" 2>&1) || say "the machine could not leave its group: $(tail -n 2 <<<"$answer")"
}

# complete HOOK: tell the group to go on.
complete() {
  local answer
  answer=$(aws autoscaling complete-lifecycle-action --auto-scaling-group-name "$AUTO_SCALING_GROUP" --lifecycle-hook-name "$1" \
    --instance-id "$INSTANCE" --lifecycle-action-result CONTINUE 2>&1) || grep -q "No active Lifecycle Action" <<<"$answer" || {
    echo "$answer"
    return 1
  }
}

stop() {
  docker stop -t "$STOP_TIMEOUT_S" "$CONTAINER" >/dev/null
}

# systemd sets SERVICE_RESULT: success, exit-code, timeout, signal, ...
report() {
  if [[ ${SERVICE_RESULT:-success} != success && ! -e $RUNTIME_DIRECTORY/reported ]]; then
    say "FAILED: the image server ended (${SERVICE_RESULT}, ${EXIT_STATUS:-no status}); its last lines: $(last_lines)"
  fi
}

last_lines() {
  docker logs --tail 5 "$CONTAINER" 2>&1 | tail -c 1500
}

# gauge NAME: the value of a metric without labels.
gauge() {
  awk -v name="$1" '$1 == name { print $2 }' <<<"$metrics"
}

# metric NAME: the sum of a runner metric over the methods that generate, as a whole number. The runner also counts health checks.
metric() {
  awk -v name="$1" 'index($0, name "{") == 1 && /endpoint="\/(txt2img|img2img|inpaint)"/ { sum += $NF } END { printf "%d\n", sum }' \
    <<<"$metrics"
}

watch() {
  local metrics
  if [[ -n $AUTO_SCALING_GROUP ]] && is_leaving; then
    leave_group
    return
  fi
  if ! metrics=$(curl --silent --fail --max-time 10 "http://127.0.0.1:$PORT/metrics"); then
    # The server is loading or down. A machine that never becomes ready must stop too, but a start may take READY_TIMEOUT_S.
    if ((IDLE_STOP_MINUTES > 0)); then stop_when_idle 0 down $((IDLE_STOP_MINUTES * 60 + READY_TIMEOUT_S)); fi
    return
  fi
  # A machine that does not generate has no backlog either, and would make the group look idle.
  if [[ -n $AUTO_SCALING_GROUP ]] && is_ready; then report_load; fi
  if ((IDLE_STOP_MINUTES > 0)); then
    stop_when_idle "$(metric bentoml_runner_request_in_progress)" "$(metric bentoml_runner_request_total)" $((IDLE_STOP_MINUTES * 60))
  fi
}

# The policies in scaling.tf use both metrics.
report_load() {
  local backlog_s running busy_percent=0 dimensions
  backlog_s=$(gauge stable_diffusion_backlog_seconds)
  running=$(gauge stable_diffusion_running_jobs)
  if [[ $running != 0.0 ]]; then busy_percent=100; fi
  dimensions="\"Dimensions\": [{\"Name\": \"AutoScalingGroupName\", \"Value\": \"$AUTO_SCALING_GROUP\"}]"
  aws cloudwatch put-metric-data --namespace "$METRIC_NAMESPACE" --metric-data \
    "[{\"MetricName\": \"$BACKLOG_METRIC\", \"Unit\": \"Seconds\", \"Value\": $backlog_s, $dimensions}, {\"MetricName\": \"$BUSY_METRIC\", \"Unit\": \"Percent\", \"Value\": $busy_percent, $dimensions}]"
}

# stop_when_idle IN_PROGRESS TOTAL LIMIT_S: power off if no request is in progress and TOTAL has not changed for LIMIT_S.
stop_when_idle() {
  local total=$2 now seen since
  now=$(date +%s)
  read -r seen since 2>/dev/null <"$RUNTIME_DIRECTORY/last_request" || { seen=none since=$now; }
  if [[ $1 != 0 || $seen != "$total" ]]; then
    echo "$total $now" >"$RUNTIME_DIRECTORY/last_request"
  elif ((now - since >= $3)); then
    say "stopping: no request for $(((now - since) / 60)) minutes; to start it again, use the command that \`terraform output start_command\` prints"
    systemctl poweroff
  fi
}

case ${1:-} in
  prepare | run | stop | report | watch) "$1" ;;
  wait) wait_until_ready ;;
  *)
    echo "usage: $0 prepare | run | wait | stop | report | watch" >&2
    exit 2
    ;;
esac
