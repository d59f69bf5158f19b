# Values that depend only on the variables. Terraform can evaluate this file without a provider.

locals {
  single = var.instances == null

  # IAM names are global, so they include the region.
  global_name = "${var.deployment_name}-${var.region}"
  log_group   = "/bentoctl/${var.deployment_name}"

  image_parts      = regex("^(?P<registry>[^/]+)/(?P<repository>[^:]+):(?P<version>.+)$", var.image_tag)
  image_registry   = local.image_parts.registry
  image_repository = local.image_parts.repository
  image_version    = local.image_parts.version

  # The host's port; the container's is 3000.
  port = 80

  # As long as the longest request: `traffic.timeout` in configuration.yaml.
  longest_request_s = 3600
  ready_timeout_s   = 1800

  # torch 2.13 with CUDA 13 needs this driver. An AMI older than its release cannot have it.
  minimum_driver_major = 580
  oldest_ami_date      = "2025-08-01T00:00:00Z"

  ready_hook = "ready"
  leave_hook = "leave"
  # Until a machine notices that it is to leave, and then the longest request.
  leave_timeout_s = local.longest_request_s + 300

  metric_namespace = "StableDiffusion"
  backlog_metric   = "BacklogSeconds"
  busy_metric      = "BusyPercent"
  # A new machine needs some five minutes until it generates (an estimate): for less work than this it comes too late. With much more, a
  # queue that grows would reach SD_MAX_QUEUE_S, 600 s, where requests are refused, before the new machine helps.
  backlog_s_per_machine = 120
  # How busy the others may be after one has left. Above it they would soon need it again.
  busy_percent_after_leaving = 70

  # The smallest node that holds what docs/fleet.md asks for, 1 GB of which jobs and images take at most 650 MB: 1.37 GiB, less 30 % that
  # stay reserved, are 1.03 GB. By docs/scale.md a job costs 3.2 ms of a core and half a megabyte each way, and the replica gets half a
  # megabyte too. So the 0.128 Gbit/s that this node has at all times (5 in bursts) carry some 16 images of 512x512 a second, in a tenth of a
  # core: those of 80 machines that need five seconds for one. For more take cache.m7g.large, with seven times the bandwidth.
  store_node_type = "cache.t4g.small"
  store_nodes     = 2
  store_port      = 6379

  uses_secrets_manager = var.api_key_arn != null && strcontains(coalesce(var.api_key_arn, "-"), ":secretsmanager:")
  uses_ssm_parameter   = var.api_key_arn != null && strcontains(coalesce(var.api_key_arn, "-"), ":ssm:")

  has_keys = var.api_key_arn != null || lookup(var.environment_variables, "SD_API_KEYS", "") != ""

  scheme      = var.certificate_arn == null ? "http" : "https"
  public_port = var.certificate_arn == null ? 80 : 443
}
