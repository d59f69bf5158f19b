# Everything that follows from the variables alone. No provider is needed to evaluate this file.

locals {
  single = var.instances == null

  # IAM is one for all regions, so the region is part of these names.
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

  # What torch 2.13's CUDA 13 needs. An AMI from before that driver came out cannot have it.
  minimum_driver_major = 580
  oldest_ami_date      = "2025-08-01T00:00:00Z"

  ready_hook       = "ready"
  metric_namespace = "StableDiffusion"
  metric_name      = "RequestsInProgress"
  # More than one request at a machine means that one is waiting or two share its steps; from two on, another machine helps.
  requests_in_progress_per_machine = 2

  uses_secrets_manager = var.api_key_arn != null && strcontains(coalesce(var.api_key_arn, "-"), ":secretsmanager:")
  uses_ssm_parameter   = var.api_key_arn != null && strcontains(coalesce(var.api_key_arn, "-"), ":ssm:")

  has_keys = var.api_key_arn != null || lookup(var.environment_variables, "SD_API_KEYS", "") != ""

  scheme      = var.certificate_arn == null ? "http" : "https"
  public_port = var.certificate_arn == null ? 80 : 443
}
