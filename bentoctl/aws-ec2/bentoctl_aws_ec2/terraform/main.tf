# The launch template of a machine, its user data and its log. `single.tf` or `group.tf` creates one machine or many from it.

module "boot" {
  source = "./boot"

  environment_variables = var.environment_variables
  stop_timeout_s        = local.longest_request_s
  ready_timeout_s       = local.ready_timeout_s

  settings = {
    REGION               = var.region
    IMAGE                = local.image
    PORT                 = local.port
    ENABLE_GPUS          = var.enable_gpus
    MINIMUM_DRIVER_MAJOR = local.minimum_driver_major
    STOP_TIMEOUT_S       = local.longest_request_s
    LOG_GROUP            = local.log_group
    API_KEY_ARN          = var.api_key_arn == null ? "" : var.api_key_arn
    IDLE_STOP_MINUTES    = var.idle_stop_minutes
    AUTO_SCALING_GROUP   = local.single ? "" : var.deployment_name
    READY_HOOK           = local.ready_hook
    READY_TIMEOUT_S      = local.ready_timeout_s
    KEEP_ALIVE_S         = local.longest_request_s + 60
    LEAVE_HOOK           = local.leave_hook
    METRIC_NAMESPACE     = local.metric_namespace
    BACKLOG_METRIC       = local.backlog_metric
    BUSY_METRIC          = local.busy_metric
    STORE_ADDRESS        = local.store_address
    STORE_PASSWORD_ARN   = local.store_password_arn
  }
}

resource "aws_launch_template" "machine" {
  # checkov:skip=CKV_AWS_88:Without a public address the machine needs a NAT gateway (more than 30 dollars a month) to reach the registry.
  name                                 = var.deployment_name
  description                          = "Machines of ${var.deployment_name}"
  image_id                             = data.aws_ami.machine.id
  instance_type                        = data.aws_ec2_instance_type.machine.instance_type
  instance_initiated_shutdown_behavior = local.single ? "stop" : null
  user_data                            = module.boot.user_data
  ebs_optimized                        = true

  block_device_mappings {
    device_name = data.aws_ami.machine.root_device_name

    ebs {
      volume_type           = "gp3"
      volume_size           = var.disk_size_gb
      encrypted             = true
      delete_on_termination = true
    }
  }

  iam_instance_profile {
    arn = aws_iam_instance_profile.machine.arn
  }

  dynamic "instance_market_options" {
    for_each = var.spot ? ["spot"] : []
    content {
      market_type = instance_market_options.value

      # A single machine waits until capacity returns; a group starts another one and allows only one-time requests.
      dynamic "spot_options" {
        for_each = local.single ? ["persistent"] : []
        content {
          spot_instance_type             = spot_options.value
          instance_interruption_behavior = "stop"
        }
      }
    }
  }

  # IMDSv2 only, and not from inside the container, which is one hop further away.
  metadata_options {
    http_endpoint               = "enabled"
    http_tokens                 = "required"
    http_put_response_hop_limit = 1
  }

  # EC2 accepts no separate subnet if the template describes the interface; Auto Scaling chooses the subnet itself.
  network_interfaces {
    subnet_id                   = local.single ? local.subnet_ids[0] : null
    associate_public_ip_address = true
    delete_on_termination       = true
    security_groups             = [aws_security_group.machine.id]
  }

  tag_specifications {
    resource_type = "instance"
    tags          = { Name = var.deployment_name, Deployment = var.deployment_name }
  }
  tag_specifications {
    resource_type = "volume"
    tags          = { Name = var.deployment_name, Deployment = var.deployment_name }
  }
}

resource "aws_cloudwatch_log_group" "machine" {
  # checkov:skip=CKV_AWS_158:AWS's own key encrypts it; no prompt is logged, so a customer-managed key would only add costs.
  # checkov:skip=CKV_AWS_338:A month is enough to find faults; nothing requires keeping these logs for a year.
  name              = local.log_group
  retention_in_days = 30
}
