# With `instances`: many machines behind a load balancer.

resource "aws_lb" "balancer" {
  # checkov:skip=CKV_AWS_91:Access logs need a bucket; the servers log every request.
  # checkov:skip=CKV_AWS_150:`bentoctl destroy` must be able to remove it.
  # checkov:skip=CKV2_AWS_20:With a certificate port 80 is closed; without one there is no HTTPS to redirect to.
  # checkov:skip=CKV2_AWS_28:AWS WAF costs more than this load balancer; allowed_cidrs limits access.
  count = local.single ? 0 : 1

  name                       = var.deployment_name
  load_balancer_type         = "application"
  security_groups            = [aws_security_group.balancer[0].id]
  subnets                    = local.subnet_ids
  idle_timeout               = local.longest_request_s
  drop_invalid_header_fields = true
}

resource "aws_lb_target_group" "machine" {
  # checkov:skip=CKV_AWS_378:Traffic between the load balancer and its machines stays in one VPC, and their security group admits nothing else.
  count = local.single ? 0 : 1

  # At most 6 characters. A generated name lets Terraform create the new one before it destroys the old one.
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
    unhealthy_threshold = 10 # long enough to restart a failed container
  }

  # A server sets this cookie when a response names a running job: requests about the job must reach the same machine. Machines that share
  # their state all know the job.
  stickiness {
    enabled         = !var.shared_state
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
  # `destroy` does not wait for the longest request.
  force_delete = true
  # The number of machines, which the policy in scaling.tf needs. AWS charges nothing for it.
  enabled_metrics = ["GroupInServiceInstances"]
  # terraform_data.group_ready waits instead, and can report what went wrong.
  wait_for_capacity_timeout = "0"

  launch_template {
    id      = aws_launch_template.machine.id
    version = aws_launch_template.machine.latest_version
  }

  # A machine joins the group and gets requests once machine.sh has reported that the server is ready.
  initial_lifecycle_hook {
    name                 = local.ready_hook
    lifecycle_transition = "autoscaling:EC2_INSTANCE_LAUNCHING"
    default_result       = "ABANDON"
    heartbeat_timeout    = local.ready_timeout_s + 300
  }

  # A new version of the launch template starts it: new machines start first, then the old ones drain and end. auto_rollback would
  # return to a template that Terraform has changed already, and then block the apply that corrects it.
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
    aws_vpc_security_group_egress_rule.machine_to_store,
    aws_vpc_security_group_ingress_rule.store_from_machine,
    aws_secretsmanager_secret_version.store,
    aws_vpc_security_group_ingress_rule.machine_from_balancer,
    aws_vpc_security_group_egress_rule.balancer_to_machine,
    aws_lb_listener.http,
    aws_lb_listener.https,
  ]
}

resource "terraform_data" "group_ready" {
  count            = local.single ? 0 : 1
  triggers_replace = [aws_autoscaling_group.machine[0].id, aws_launch_template.machine.latest_version, var.instances.min]

  provisioner "local-exec" {
    command = "python3 ${path.module}/wait_until_ready.py --region ${var.region} --log-group ${local.log_group} --timeout-s ${2 * local.ready_timeout_s} --auto-scaling-group ${aws_autoscaling_group.machine[0].name} --target-group ${aws_lb_target_group.machine[0].arn} --template-version ${aws_launch_template.machine.latest_version} --machines ${var.instances.min}"
  }
}
