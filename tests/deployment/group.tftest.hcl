# What Terraform would make for many machines. Every provider is mocked: nothing is asked of AWS.

mock_provider "aws" {
  source = "./mocks"
}

variables {
  instances = { min = 1, max = 3 }
}

run "many_machines_behind_a_load_balancer" {
  command = plan

  assert {
    condition     = length(aws_instance.machine) == 0 && length(aws_eip.machine) == 0 && length(terraform_data.machine_ready) == 0
    error_message = "There must be no machine outside the group."
  }
  assert {
    condition     = aws_autoscaling_group.machine[0].min_size == 1 && aws_autoscaling_group.machine[0].max_size == 3 && aws_autoscaling_group.machine[0].health_check_type == "ELB"
    error_message = "The group must have the configured sizes and use the load balancer's health check."
  }
  assert {
    condition     = one(aws_autoscaling_group.machine[0].initial_lifecycle_hook).default_result == "ABANDON" && aws_launch_template.machine.network_interfaces[0].subnet_id == null
    error_message = "A machine must join when it is ready, in a subnet that the group chooses."
  }
  assert {
    condition     = aws_lb_target_group.machine[0].load_balancing_algorithm_type == "least_outstanding_requests" && aws_lb_target_group.machine[0].health_check[0].path == "/readyz"
    error_message = "A request must go to the ready machine with the fewest requests."
  }
  assert {
    condition     = aws_lb_target_group.machine[0].stickiness[0].type == "app_cookie" && aws_lb_target_group.machine[0].stickiness[0].cookie_name == "job_server"
    error_message = "Requests about a job must reach the machine that has it."
  }
  assert {
    condition     = tonumber(aws_lb_target_group.machine[0].deregistration_delay) == 3600 && aws_lb.balancer[0].idle_timeout == 3600
    error_message = "Draining machines and waiting clients must have the time of the longest request."
  }
  assert {
    condition     = aws_autoscaling_group.machine[0].instance_refresh[0].preferences[0].min_healthy_percentage == 100 && aws_autoscaling_group.machine[0].force_delete
    error_message = "New machines must start first, and destroying must not wait for requests."
  }
  assert {
    condition     = one(aws_autoscaling_policy.work_waiting[0].target_tracking_configuration[0].customized_metric_specification[0].metric_dimension).value == aws_autoscaling_group.machine[0].name
    error_message = "The policy must use the metric that the machines of this group report."
  }
  assert {
    condition     = length(aws_vpc_security_group_ingress_rule.machine) == 0 && keys(aws_vpc_security_group_ingress_rule.balancer) == ["203.0.113.7/32"]
    error_message = "Only the load balancer may be reachable, from the allowed blocks."
  }
  assert {
    condition     = one([for statement in data.aws_iam_policy_document.machine.statement : statement if statement.sid == "ReportLoad"]).condition != null
    error_message = "The role may write metrics of one namespace only."
  }
  assert {
    condition     = length(aws_lb_listener.http) == 1 && length(aws_lb_listener.https) == 0 && aws_vpc_security_group_ingress_rule.balancer["203.0.113.7/32"].from_port == 80
    error_message = "Without a certificate the listener must use HTTP."
  }
}

run "a_certificate_makes_it_https_only" {
  command = plan

  variables {
    certificate_arn = "arn:aws:acm:us-west-1:123456789012:certificate/01234567-89ab-cdef-0123-456789abcdef"
  }

  assert {
    condition     = length(aws_lb_listener.http) == 0 && aws_lb_listener.https[0].port == 443 && startswith(aws_lb_listener.https[0].ssl_policy, "ELBSecurityPolicy-TLS13-1-2")
    error_message = "The listener must require TLS 1.2 or newer."
  }
  assert {
    condition     = aws_vpc_security_group_ingress_rule.balancer["203.0.113.7/32"].from_port == 443
    error_message = "Only port 443 may be open."
  }
}

run "the_outputs_lead_to_the_load_balancer" {
  assert {
    condition     = output.endpoint == "http://balancer.example" && output.start_command == null && output.tunnel_command == null
    error_message = "The outputs must have the load balancer's address and nothing that applies to a single machine."
  }
  assert {
    condition     = strcontains(output.session_command, "AutoScalingGroupName=='stable-diffusion'")
    error_message = "The shell command must list the machines."
  }
}

run "spot_machines_of_a_group_are_one_time_requests" {
  command = plan

  variables {
    spot = true
  }

  assert {
    condition     = aws_launch_template.machine.instance_market_options[0].market_type == "spot" && length(aws_launch_template.machine.instance_market_options[0].spot_options) == 0
    error_message = "Auto Scaling allows only one-time requests."
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
