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

  ready_hook       = "ready"
  metric_namespace = "StableDiffusion"
  metric_name      = "RequestsInProgress"
  # With more than one request on a machine, requests wait or share its steps; from two on, another machine helps.
  requests_in_progress_per_machine = 2

  uses_secrets_manager = var.api_key_arn != null && strcontains(coalesce(var.api_key_arn, "-"), ":secretsmanager:")
  uses_ssm_parameter   = var.api_key_arn != null && strcontains(coalesce(var.api_key_arn, "-"), ":ssm:")

  has_keys = var.api_key_arn != null || lookup(var.environment_variables, "SD_API_KEYS", "") != ""

  scheme      = var.certificate_arn == null ? "http" : "https"
  public_port = var.certificate_arn == null ? 80 : 443
}
