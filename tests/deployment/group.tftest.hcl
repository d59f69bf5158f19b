# What Terraform would make for many machines. Every provider is mocked: nothing is asked of AWS.

mock_provider "aws" {
  mock_data "aws_caller_identity" {
    defaults = { account_id = "123456789012" }
  }
  mock_data "aws_partition" {
    defaults = { partition = "aws" }
  }
  mock_data "aws_ecr_image" {
    defaults = { image_digest = "sha256:0123" }
  }
  mock_data "aws_ssm_parameter" {
    defaults = { insecure_value = "ami-0fedcba9876543210" }
  }
  mock_data "aws_ami" {
    defaults = {
      id                    = "ami-0fedcba9876543210"
      name                  = "Deep Learning Base OSS Nvidia Driver GPU AMI (Ubuntu 24.04) 20261006"
      architecture          = "x86_64"
      creation_date         = "2026-10-06T12:00:00.000Z"
      root_device_name      = "/dev/sda1"
      block_device_mappings = [{ device_name = "/dev/sda1", ebs = { volume_size = "75" }, no_device = "", virtual_name = "" }]
    }
  }
  mock_data "aws_ec2_instance_type" {
    defaults = {
      supported_architectures = ["x86_64"]
      gpus                    = [{ manufacturer = "NVIDIA", name = "T4", count = 1, memory_size = 16384 }]
    }
  }
  mock_data "aws_ec2_instance_type_offerings" {
    defaults = { locations = ["us-west-1a", "us-west-1c"] }
  }
  mock_data "aws_vpc" {
    defaults = { id = "vpc-01234567" }
  }
  mock_data "aws_subnets" {
    defaults = { ids = ["subnet-0000000b", "subnet-0000000a"] }
  }
  mock_data "aws_subnet" {
    defaults = { vpc_id = "vpc-01234567" }
  }
  mock_data "aws_iam_policy_document" {
    defaults = { json = "{}" }
  }
  mock_resource "aws_launch_template" {
    defaults = { id = "lt-01234567", latest_version = 7 }
  }
  mock_resource "aws_eip" {
    defaults = { public_ip = "198.51.100.7", allocation_id = "eipalloc-01234567" }
  }
  mock_resource "aws_lb" {
    defaults = { dns_name = "balancer.example", arn = "arn:aws:elasticloadbalancing:us-west-1:123456789012:loadbalancer/app/sd/0123" }
  }
  mock_resource "aws_lb_target_group" {
    defaults = { arn = "arn:aws:elasticloadbalancing:us-west-1:123456789012:targetgroup/sd/0123" }
  }
  mock_resource "aws_cloudwatch_log_group" {
    defaults = { arn = "arn:aws:logs:us-west-1:123456789012:log-group:/bentoctl/stable-diffusion" }
  }
}

variables {
  deployment_name       = "stable-diffusion"
  region                = "us-west-1"
  image_tag             = "123456789012.dkr.ecr.us-west-1.amazonaws.com/stable-diffusion:abc"
  instance_type         = "g4dn.xlarge"
  enable_gpus           = true
  ami_id                = null
  disk_size_gb          = 120
  spot                  = false
  idle_stop_minutes     = 0
  instances             = { min = 1, max = 3 }
  certificate_arn       = null
  allowed_cidrs         = ["203.0.113.7/32"]
  subnet_ids            = []
  api_key_arn           = null
  environment_variables = {}
}

run "many_machines_behind_a_load_balancer" {
  command = plan

  assert {
    condition     = length(aws_instance.machine) == 0 && length(aws_eip.machine) == 0 && length(terraform_data.machine_ready) == 0
    error_message = "No machine outside the group."
  }
  assert {
    condition     = aws_autoscaling_group.machine[0].min_size == 1 && aws_autoscaling_group.machine[0].max_size == 3 && aws_autoscaling_group.machine[0].health_check_type == "ELB"
    error_message = "As many as asked for, judged by the load balancer."
  }
  assert {
    condition     = one(aws_autoscaling_group.machine[0].initial_lifecycle_hook).default_result == "ABANDON" && aws_launch_template.machine.network_interfaces[0].subnet_id == null
    error_message = "A machine joins when it is ready, in a subnet of the group's choice."
  }
  assert {
    condition     = aws_lb_target_group.machine[0].load_balancing_algorithm_type == "least_outstanding_requests" && aws_lb_target_group.machine[0].health_check[0].path == "/readyz"
    error_message = "A request goes to the machine with the fewest, and only where pictures can be made."
  }
  assert {
    condition     = tonumber(aws_lb_target_group.machine[0].deregistration_delay) == 3600 && aws_lb.balancer[0].idle_timeout == 3600
    error_message = "A machine that goes, and a client that waits, have as long as the longest request."
  }
  assert {
    condition     = aws_autoscaling_group.machine[0].instance_refresh[0].preferences[0].min_healthy_percentage == 100 && aws_autoscaling_group.machine[0].force_delete
    error_message = "New machines first; and destroying waits for no request."
  }
  assert {
    condition     = one(aws_autoscaling_policy.work_waiting[0].target_tracking_configuration[0].customized_metric_specification[0].metric_dimension).value == aws_autoscaling_group.machine[0].name
    error_message = "The policy reads what the machines of this group report."
  }
  assert {
    condition     = length(aws_vpc_security_group_ingress_rule.machine) == 0 && keys(aws_vpc_security_group_ingress_rule.balancer) == ["203.0.113.7/32"]
    error_message = "Only the load balancer is reachable, from the allowed blocks."
  }
  assert {
    condition     = one([for statement in data.aws_iam_policy_document.machine.statement : statement if statement.sid == "ReportLoad"]).condition != null
    error_message = "The role may write metrics of one namespace."
  }
  assert {
    condition     = length(aws_lb_listener.http) == 1 && length(aws_lb_listener.https) == 0 && aws_vpc_security_group_ingress_rule.balancer["203.0.113.7/32"].from_port == 80
    error_message = "HTTP without a certificate."
  }
}

run "a_certificate_makes_it_https_only" {
  command = plan

  variables {
    certificate_arn = "arn:aws:acm:us-west-1:123456789012:certificate/01234567-89ab-cdef-0123-456789abcdef"
  }

  assert {
    condition     = length(aws_lb_listener.http) == 0 && aws_lb_listener.https[0].port == 443 && startswith(aws_lb_listener.https[0].ssl_policy, "ELBSecurityPolicy-TLS13-1-2")
    error_message = "TLS 1.2 and newer."
  }
  assert {
    condition     = aws_vpc_security_group_ingress_rule.balancer["203.0.113.7/32"].from_port == 443
    error_message = "Only port 443 is open."
  }
}

run "the_outputs_lead_to_the_load_balancer" {
  assert {
    condition     = output.endpoint == "http://balancer.example" && output.start_command == null && output.tunnel_command == null
    error_message = "The load balancer's address, and nothing that is for one machine."
  }
  assert {
    condition     = strcontains(output.session_command, "AutoScalingGroupName=='stable-diffusion'")
    error_message = "How to find a machine."
  }
}

run "spot_machines_of_a_group_are_one_time_requests" {
  command = plan

  variables {
    spot = true
  }

  assert {
    condition     = aws_launch_template.machine.instance_market_options[0].market_type == "spot" && length(aws_launch_template.machine.instance_market_options[0].spot_options) == 0
    error_message = "Auto Scaling takes one-time requests only."
  }
}

run "one_zone_is_too_few_for_a_load_balancer" {
  command = plan

  override_data {
    target = data.aws_ec2_instance_type_offerings.zones
    values = { locations = ["us-west-1a"] }
  }

  expect_failures = [data.aws_ec2_instance_type_offerings.zones]
}

run "one_subnet_is_too_few_for_a_load_balancer" {
  command = plan

  variables {
    subnet_ids = ["subnet-01234567"]
  }

  expect_failures = [var.subnet_ids]
}

run "a_group_is_not_stopped_when_idle" {
  command = plan

  variables {
    idle_stop_minutes = 30
  }

  expect_failures = [var.idle_stop_minutes]
}
