################################################################################
# What is there already: the image, the AMI, the network
################################################################################

data "aws_caller_identity" "current" {}

data "aws_partition" "current" {}

# By digest, so that a tag that is pushed anew replaces the machine too.
data "aws_ecr_image" "server" {
  repository_name = local.image_repository
  image_tag       = local.image_version
}

data "aws_ssm_parameter" "deep_learning_ami" {
  count = var.ami_id == null ? 1 : 0
  name  = "/aws/service/deeplearning/ami/x86_64/base-oss-nvidia-driver-gpu-ubuntu-24.04/latest/ami-id"
}

data "aws_ami" "machine" {
  # Public AMIs are deprecated after two years at most; which is too old is said below.
  include_deprecated = true

  filter {
    name   = "image-id"
    values = [var.ami_id == null ? data.aws_ssm_parameter.deep_learning_ami[0].insecure_value : var.ami_id]
  }

  lifecycle {
    postcondition {
      condition     = self.architecture == "x86_64"
      error_message = "The AMI ${self.id} (${self.name}) is for ${self.architecture}; the image is built for x86_64."
    }
    postcondition {
      condition     = !var.enable_gpus || timecmp(self.creation_date, local.oldest_ami_date) >= 0
      error_message = "The AMI ${self.id} (${self.name}) was made on ${substr(self.creation_date, 0, 10)}; torch's CUDA 13 needs NVIDIA driver ${local.minimum_driver_major}, which came out later. Use a newer ami_id, or none."
    }
    postcondition {
      condition     = alltrue([for device in self.block_device_mappings : try(tonumber(device.ebs.volume_size), 0) <= var.disk_size_gb if device.device_name == self.root_device_name])
      error_message = "The AMI ${self.id} (${self.name}) needs a larger root disk than disk_size_gb = ${var.disk_size_gb}."
    }
  }
}

data "aws_ec2_instance_type" "machine" {
  instance_type = var.instance_type

  lifecycle {
    postcondition {
      condition     = contains(self.supported_architectures, "x86_64")
      error_message = "${var.instance_type} has no x86_64 processor, and the image is built for x86_64."
    }
    postcondition {
      condition     = !var.enable_gpus || anytrue([for gpu in self.gpus : gpu.manufacturer == "NVIDIA"])
      error_message = "${var.instance_type} has no NVIDIA GPU: set enable_gpus to false or choose another instance type."
    }
  }
}

# Not every availability zone has every instance type.
data "aws_ec2_instance_type_offerings" "zones" {
  location_type = "availability-zone"

  filter {
    name   = "instance-type"
    values = [var.instance_type]
  }

  lifecycle {
    postcondition {
      condition     = length(self.locations) >= (local.single ? 1 : 2)
      error_message = "${var.region} offers ${var.instance_type} in ${length(self.locations)} availability zones; ${local.single ? 1 : 2} needed. Choose another region or instance type."
    }
  }
}

data "aws_vpc" "default" {
  count   = length(var.subnet_ids) == 0 ? 1 : 0
  default = true
}

data "aws_subnets" "default" {
  count = length(var.subnet_ids) == 0 ? 1 : 0

  filter {
    name   = "vpc-id"
    values = [data.aws_vpc.default[0].id]
  }
  filter {
    name   = "default-for-az"
    values = ["true"]
  }
  filter {
    name   = "availability-zone"
    values = data.aws_ec2_instance_type_offerings.zones.locations
  }

  lifecycle {
    postcondition {
      condition     = length(self.ids) >= (local.single ? 1 : 2)
      error_message = "The default VPC has ${length(self.ids)} default subnets where ${var.instance_type} is offered; ${local.single ? 1 : 2} needed. Give subnet_ids."
    }
  }
}

data "aws_subnet" "first" {
  id = local.subnet_ids[0]
}

locals {
  subnet_ids = length(var.subnet_ids) == 0 ? sort(data.aws_subnets.default[0].ids) : var.subnet_ids
  vpc_id     = data.aws_subnet.first.vpc_id

  account   = data.aws_caller_identity.current.account_id
  partition = data.aws_partition.current.partition
  image     = "${local.image_registry}/${local.image_repository}@${data.aws_ecr_image.server.image_digest}"
}

################################################################################
# Logs
################################################################################

resource "aws_cloudwatch_log_group" "machine" {
  # checkov:skip=CKV_AWS_158:AWS's own key encrypts it; no prompt is logged, so a key of one's own would only add costs.
  # checkov:skip=CKV_AWS_338:A month is enough for finding faults; nobody has to keep these logs for a year.
  name              = local.log_group
  retention_in_days = 30
}

################################################################################
# What the machine may do
################################################################################

data "aws_iam_policy_document" "assume" {
  statement {
    actions = ["sts:AssumeRole"]

    principals {
      type        = "Service"
      identifiers = ["ec2.amazonaws.com"]
    }
  }
}

data "aws_iam_policy_document" "machine" {
  # checkov:skip=CKV_AWS_111:Sessions, logging in and metrics know no resources, see below.
  # checkov:skip=CKV_AWS_356:Sessions, logging in and metrics know no resources, see below.
  # GetAuthorizationToken, PutMetricData and sessions know no resources; a condition holds the metrics to one namespace.
  statement {
    sid       = "LogInToRegistry"
    actions   = ["ecr:GetAuthorizationToken"]
    resources = ["*"]
  }

  statement {
    sid       = "PullImage"
    actions   = ["ecr:BatchCheckLayerAvailability", "ecr:BatchGetImage", "ecr:GetDownloadUrlForLayer"]
    resources = ["arn:${local.partition}:ecr:${var.region}:${local.account}:repository/${local.image_repository}"]
  }

  statement {
    sid       = "WriteLogs"
    actions   = ["logs:CreateLogStream", "logs:PutLogEvents"]
    resources = ["${aws_cloudwatch_log_group.machine.arn}:*"]
  }

  # Sessions through SSM take the place of SSH: no key, no open port. AWS's own policy for it would let the machine read every parameter
  # of the account as well.
  statement {
    sid = "OpenSessions"
    actions = [
      "ssm:UpdateInstanceInformation",
      "ssmmessages:CreateControlChannel", "ssmmessages:CreateDataChannel",
      "ssmmessages:OpenControlChannel", "ssmmessages:OpenDataChannel",
    ]
    resources = ["*"]
  }

  dynamic "statement" {
    for_each = local.single ? [] : [local.metric_namespace]
    content {
      sid       = "ReportLoad"
      actions   = ["cloudwatch:PutMetricData"]
      resources = ["*"]

      condition {
        test     = "StringEquals"
        variable = "cloudwatch:namespace"
        values   = [statement.value]
      }
    }
  }

  dynamic "statement" {
    for_each = local.single ? [] : [var.deployment_name]
    content {
      sid       = "JoinTheGroup"
      actions   = ["autoscaling:CompleteLifecycleAction"]
      resources = ["arn:${local.partition}:autoscaling:${var.region}:${local.account}:autoScalingGroup:*:autoScalingGroupName/${statement.value}"]
    }
  }

  dynamic "statement" {
    for_each = local.uses_secrets_manager ? [var.api_key_arn] : []
    content {
      sid       = "ReadApiKey"
      actions   = ["secretsmanager:GetSecretValue"]
      resources = [statement.value]
    }
  }

  dynamic "statement" {
    for_each = local.uses_ssm_parameter ? [var.api_key_arn] : []
    content {
      sid       = "ReadApiKey"
      actions   = ["ssm:GetParameter"]
      resources = [statement.value]
    }
  }
}

resource "aws_iam_role" "machine" {
  name               = local.global_name
  description        = "Machines of the deployment ${var.deployment_name}"
  assume_role_policy = data.aws_iam_policy_document.assume.json
}

resource "aws_iam_role_policy" "machine" {
  name   = "machine"
  role   = aws_iam_role.machine.id
  policy = data.aws_iam_policy_document.machine.json
}

resource "aws_iam_instance_profile" "machine" {
  name = local.global_name
  role = aws_iam_role.machine.name
}

################################################################################
# Who may reach what
################################################################################

resource "aws_security_group" "machine" {
  name_prefix = "${var.deployment_name}-machine-"
  description = "Machines of ${var.deployment_name}"
  vpc_id      = local.vpc_id

  lifecycle {
    create_before_destroy = true
  }
}

resource "aws_vpc_security_group_egress_rule" "machine_https" {
  security_group_id = aws_security_group.machine.id
  description       = "AWS APIs and the image registry"
  ip_protocol       = "tcp"
  from_port         = 443
  to_port           = 443
  cidr_ipv4         = "0.0.0.0/0"
}

resource "aws_vpc_security_group_egress_rule" "machine_updates" {
  security_group_id = aws_security_group.machine.id
  description       = "Signed packages of the operating system, which its mirrors serve over HTTP"
  ip_protocol       = "tcp"
  from_port         = 80
  to_port           = 80
  cidr_ipv4         = "0.0.0.0/0"
}

resource "aws_vpc_security_group_ingress_rule" "machine" {
  for_each = toset(local.single ? var.allowed_cidrs : [])

  security_group_id = aws_security_group.machine.id
  description       = "Picture server"
  ip_protocol       = "tcp"
  from_port         = local.port
  to_port           = local.port
  cidr_ipv4         = each.value
}

resource "aws_vpc_security_group_ingress_rule" "machine_from_balancer" {
  # checkov:skip=CKV_AWS_260:It admits the load balancer's security group, no addresses.
  count = local.single ? 0 : 1

  security_group_id            = aws_security_group.machine.id
  description                  = "Load balancer"
  ip_protocol                  = "tcp"
  from_port                    = local.port
  to_port                      = local.port
  referenced_security_group_id = aws_security_group.balancer[0].id
}

resource "aws_security_group" "balancer" {
  count = local.single ? 0 : 1

  name_prefix = "${var.deployment_name}-balancer-"
  description = "Load balancer of ${var.deployment_name}"
  vpc_id      = local.vpc_id

  lifecycle {
    create_before_destroy = true
  }
}

resource "aws_vpc_security_group_egress_rule" "balancer_to_machine" {
  count = local.single ? 0 : 1

  security_group_id            = aws_security_group.balancer[0].id
  description                  = "Machines"
  ip_protocol                  = "tcp"
  from_port                    = local.port
  to_port                      = local.port
  referenced_security_group_id = aws_security_group.machine.id
}

resource "aws_vpc_security_group_ingress_rule" "balancer" {
  for_each = toset(local.single ? [] : var.allowed_cidrs)

  security_group_id = aws_security_group.balancer[0].id
  description       = "Picture server"
  ip_protocol       = "tcp"
  from_port         = local.public_port
  to_port           = local.public_port
  cidr_ipv4         = each.value
}

################################################################################
# The machine
################################################################################

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
    METRIC_NAMESPACE     = local.metric_namespace
    METRIC_NAME          = local.metric_name
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

      # One machine waits for its capacity to come back; a group starts another by itself and takes one-time requests only.
      dynamic "spot_options" {
        for_each = local.single ? ["persistent"] : []
        content {
          spot_instance_type             = spot_options.value
          instance_interruption_behavior = "stop"
        }
      }
    }
  }

  # Version 2 only, and not from inside the container, which is one hop further away.
  metadata_options {
    http_endpoint               = "enabled"
    http_tokens                 = "required"
    http_put_response_hop_limit = 1
  }

  # EC2 takes no subnet beside a template that describes the interface; Auto Scaling chooses the subnet itself.
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

################################################################################
# One machine with a fixed address
################################################################################

resource "aws_instance" "machine" {
  # checkov:skip=CKV2_AWS_41:The launch template gives the role.
  count = local.single ? 1 : 0

  tags = { Name = var.deployment_name }

  # A new version, that is a new image, AMI or setting, replaces the machine.
  launch_template {
    id      = aws_launch_template.machine.id
    version = aws_launch_template.machine.latest_version
  }

  # The new one is up, and the address is moved, before the old one goes.
  lifecycle {
    create_before_destroy = true
  }

  # Its rights and its way out must be there when it boots.
  depends_on = [
    aws_iam_role_policy.machine,
    aws_vpc_security_group_egress_rule.machine_https,
  ]
}

resource "aws_eip" "machine" {
  count  = local.single ? 1 : 0
  domain = "vpc"
}

resource "terraform_data" "machine_ready" {
  count            = local.single ? 1 : 0
  triggers_replace = [aws_instance.machine[0].id]

  provisioner "local-exec" {
    command = "python3 ${path.module}/wait_until_ready.py --region ${var.region} --log-group ${local.log_group} --timeout-s ${local.ready_timeout_s + 300} --instance ${aws_instance.machine[0].id}"
  }
}

resource "aws_eip_association" "machine" {
  count = local.single ? 1 : 0

  instance_id         = aws_instance.machine[0].id
  allocation_id       = aws_eip.machine[0].allocation_id
  allow_reassociation = true

  lifecycle {
    create_before_destroy = true
  }

  depends_on = [terraform_data.machine_ready]
}

################################################################################
# Many machines behind a load balancer
################################################################################

resource "aws_lb" "balancer" {
  # checkov:skip=CKV_AWS_91:Access logs need a bucket; the servers log every request.
  # checkov:skip=CKV_AWS_150:`bentoctl destroy` must be able to remove it.
  # checkov:skip=CKV2_AWS_20:Port 80 is closed where there is a certificate; without one there is nowhere to redirect to.
  # checkov:skip=CKV2_AWS_28:A firewall of AWS's costs more than this load balancer; allowed_cidrs says who gets in.
  count = local.single ? 0 : 1

  name                       = var.deployment_name
  load_balancer_type         = "application"
  security_groups            = [aws_security_group.balancer[0].id]
  subnets                    = local.subnet_ids
  idle_timeout               = local.longest_request_s
  drop_invalid_header_fields = true
}

resource "aws_lb_target_group" "machine" {
  # checkov:skip=CKV_AWS_378:Between the load balancer and its machines, in one VPC, whose security group admits nobody else.
  count = local.single ? 0 : 1

  # At most 6 characters; a name of its own lets a new one be made before the old one goes.
  name_prefix                   = substr(var.deployment_name, 0, 6)
  port                          = local.port
  protocol                      = "HTTP"
  vpc_id                        = local.vpc_id
  load_balancing_algorithm_type = "least_outstanding_requests"
  deregistration_delay          = local.longest_request_s

  health_check {
    path                = "/readyz"
    matcher             = "200"
    interval            = 15
    timeout             = 10
    healthy_threshold   = 2
    unhealthy_threshold = 10 # long enough for a container that failed to be started again
  }

  # A server sets this cookie when it names a job that is going on: questions about the job have to come to the same machine.
  stickiness {
    type            = "app_cookie"
    cookie_name     = "job_server"
    cookie_duration = 3600
  }

  lifecycle {
    create_before_destroy = true
  }
}

resource "aws_lb_listener" "http" {
  # checkov:skip=CKV_AWS_103:The HTTPS listener sets the policy.
  count = !local.single && var.certificate_arn == null ? 1 : 0

  load_balancer_arn = aws_lb.balancer[0].arn
  port              = 80
  protocol          = "HTTP"

  default_action {
    type             = "forward"
    target_group_arn = aws_lb_target_group.machine[0].arn
  }
}

resource "aws_lb_listener" "https" {
  count = !local.single && var.certificate_arn != null ? 1 : 0

  load_balancer_arn = aws_lb.balancer[0].arn
  port              = 443
  protocol          = "HTTPS"
  ssl_policy        = "ELBSecurityPolicy-TLS13-1-2-2021-06"
  certificate_arn   = var.certificate_arn

  default_action {
    type             = "forward"
    target_group_arn = aws_lb_target_group.machine[0].arn
  }
}

resource "aws_autoscaling_group" "machine" {
  count = local.single ? 0 : 1

  name                      = var.deployment_name
  min_size                  = var.instances.min
  max_size                  = var.instances.max
  vpc_zone_identifier       = local.subnet_ids
  target_group_arns         = [aws_lb_target_group.machine[0].arn]
  health_check_type         = "ELB"
  health_check_grace_period = 60
  default_instance_warmup   = 60
  # Destroying does not wait for the longest request.
  force_delete = true
  # terraform_data.group_ready waits, and can say what went wrong.
  wait_for_capacity_timeout = "0"

  launch_template {
    id      = aws_launch_template.machine.id
    version = aws_launch_template.machine.latest_version
  }

  # A machine counts, and gets requests, once machine.sh has said that the server is ready.
  initial_lifecycle_hook {
    name                 = local.ready_hook
    lifecycle_transition = "autoscaling:EC2_INSTANCE_LAUNCHING"
    default_result       = "ABANDON"
    heartbeat_timeout    = local.ready_timeout_s + 300
  }

  # A new version of the launch template starts it: new machines first, then the old ones drain and go. Without auto_rollback, which
  # would return to a template that Terraform has changed already, and refuse the apply that corrects it.
  instance_refresh {
    strategy = "Rolling"

    preferences {
      min_healthy_percentage = 100
      max_healthy_percentage = 200
    }
  }

  tag {
    key                 = "Deployment"
    value               = var.deployment_name
    propagate_at_launch = true
  }

  lifecycle {
    # The scaling policy sets it.
    ignore_changes = [desired_capacity]
  }

  depends_on = [
    aws_iam_role_policy.machine,
    aws_vpc_security_group_egress_rule.machine_https,
    aws_vpc_security_group_ingress_rule.machine_from_balancer,
    aws_vpc_security_group_egress_rule.balancer_to_machine,
    aws_lb_listener.http,
    aws_lb_listener.https,
  ]
}

resource "aws_autoscaling_policy" "work_waiting" {
  count = local.single ? 0 : 1

  name                   = "work-waiting"
  autoscaling_group_name = aws_autoscaling_group.machine[0].name
  policy_type            = "TargetTrackingScaling"

  target_tracking_configuration {
    target_value = local.requests_in_progress_per_machine

    customized_metric_specification {
      namespace   = local.metric_namespace
      metric_name = local.metric_name
      statistic   = "Average"

      metric_dimension {
        name  = "AutoScalingGroupName"
        value = var.deployment_name
      }
    }
  }
}

resource "terraform_data" "group_ready" {
  count            = local.single ? 0 : 1
  triggers_replace = [aws_autoscaling_group.machine[0].id, aws_launch_template.machine.latest_version, var.instances.min]

  provisioner "local-exec" {
    command = "python3 ${path.module}/wait_until_ready.py --region ${var.region} --log-group ${local.log_group} --timeout-s ${2 * local.ready_timeout_s} --auto-scaling-group ${aws_autoscaling_group.machine[0].name} --target-group ${aws_lb_target_group.machine[0].arn} --template-version ${aws_launch_template.machine.latest_version} --machines ${var.instances.min}"
  }
}
