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
    condition     = aws_lb_target_group.machine[0].stickiness[0].enabled && aws_lb_target_group.machine[0].stickiness[0].type == "app_cookie" && aws_lb_target_group.machine[0].stickiness[0].cookie_name == "job_server"
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
    condition     = one(aws_autoscaling_policy.work_waiting[0].target_tracking_configuration[0].customized_metric_specification[0].metric_dimension).value == aws_autoscaling_group.machine[0].name && aws_autoscaling_policy.work_waiting[0].target_tracking_configuration[0].customized_metric_specification[0].metric_name == "BacklogSeconds" && aws_autoscaling_policy.work_waiting[0].target_tracking_configuration[0].customized_metric_specification[0].statistic == "Average"
    error_message = "The group must grow by the seconds of work that wait for each of its machines."
  }
  assert {
    condition     = aws_autoscaling_policy.work_waiting[0].target_tracking_configuration[0].disable_scale_in && aws_autoscaling_policy.machine_to_spare[0].scaling_adjustment == -1 && aws_autoscaling_policy.machine_to_spare[0].cooldown == 900
    error_message = "Short queues must not shrink a busy group, and it must lose one machine at a time."
  }
  assert {
    condition     = one([for query in aws_cloudwatch_metric_alarm.machine_to_spare[0].metric_query : query if query.return_data == true]).expression == "IF(machines > 1, busy * machines / (machines - 1), 100)" && aws_cloudwatch_metric_alarm.machine_to_spare[0].comparison_operator == "LessThanThreshold" && aws_cloudwatch_metric_alarm.machine_to_spare[0].threshold == 70 && aws_cloudwatch_metric_alarm.machine_to_spare[0].treat_missing_data == "notBreaching"
    error_message = "A machine may leave only if the others would be busy for less than 70 % of the time without it."
  }
  assert {
    condition     = one([for query in aws_cloudwatch_metric_alarm.machine_to_spare[0].metric_query : query.metric[0] if query.id == "busy"]).metric_name == "BusyPercent" && one([for query in aws_cloudwatch_metric_alarm.machine_to_spare[0].metric_query : query.metric[0] if query.id == "machines"]).metric_name == "GroupInServiceInstances" && contains(aws_autoscaling_group.machine[0].enabled_metrics, "GroupInServiceInstances")
    error_message = "The alarm must know how busy the machines are and how many there are."
  }
  assert {
    condition     = aws_autoscaling_lifecycle_hook.leave[0].lifecycle_transition == "autoscaling:EC2_INSTANCE_TERMINATING" && aws_autoscaling_lifecycle_hook.leave[0].heartbeat_timeout == 3900 && aws_autoscaling_lifecycle_hook.leave[0].name != one(aws_autoscaling_group.machine[0].initial_lifecycle_hook).name
    error_message = "A machine that leaves must have the time of the longest request, and a minute to notice."
  }
  assert {
    condition     = length(aws_elasticache_replication_group.store) + length(aws_secretsmanager_secret.store) + length(aws_security_group.store) + length(data.aws_secretsmanager_random_password.store) == 0
    error_message = "Without shared_state there must be no Valkey."
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

run "shared_state_makes_a_valkey_that_only_the_machines_reach" {
  command = plan

  variables {
    shared_state = true
  }

  assert {
    condition     = aws_elasticache_replication_group.store[0].engine == "valkey" && aws_elasticache_replication_group.store[0].engine_version == "7.2" && one(aws_elasticache_parameter_group.store).family == "valkey7" && aws_elasticache_replication_group.store[0].node_type == "cache.t4g.small"
    error_message = "The store must be a Valkey 7."
  }
  assert {
    condition     = aws_elasticache_replication_group.store[0].num_cache_clusters == 2 && aws_elasticache_replication_group.store[0].automatic_failover_enabled && aws_elasticache_replication_group.store[0].multi_az_enabled
    error_message = "A replica in another zone must take over by itself."
  }
  assert {
    condition     = aws_elasticache_replication_group.store[0].transit_encryption_enabled && tobool(aws_elasticache_replication_group.store[0].at_rest_encryption_enabled) && aws_elasticache_replication_group.store[0].auth_token_update_strategy == "ROTATE"
    error_message = "The store must be encrypted."
  }
  assert {
    condition     = aws_elasticache_replication_group.store[0].snapshot_retention_limit == 0
    error_message = "Nothing may keep prompts and images for longer than the server does."
  }
  assert {
    condition     = { for parameter in aws_elasticache_parameter_group.store[0].parameter : parameter.name => parameter.value } == { "maxmemory-policy" = "noeviction", "reserved-memory-percent" = "30" }
    error_message = "A full store must refuse jobs and delete nothing."
  }
  assert {
    condition     = aws_elasticache_subnet_group.store[0].subnet_ids == toset(["subnet-0000000a", "subnet-0000000b"]) && aws_security_group.store[0].vpc_id == "vpc-01234567"
    error_message = "The store must be in the group's network."
  }
  assert {
    condition     = aws_vpc_security_group_ingress_rule.store_from_machine[0].from_port == 6379 && aws_vpc_security_group_ingress_rule.store_from_machine[0].to_port == 6379 && aws_vpc_security_group_ingress_rule.store_from_machine[0].cidr_ipv4 == null && aws_vpc_security_group_egress_rule.machine_to_store[0].to_port == 6379
    error_message = "The store's port must be open to a security group only, and the machines must be allowed to reach it."
  }
  assert {
    condition     = !aws_lb_target_group.machine[0].stickiness[0].enabled
    error_message = "Machines that share their state need no cookie."
  }
  assert {
    condition     = aws_secretsmanager_secret.store[0].name_prefix == "stable-diffusion-store-" && data.aws_secretsmanager_random_password.store[0].exclude_punctuation && data.aws_secretsmanager_random_password.store[0].password_length == 64
    error_message = "The password must be a long one that a URL can hold."
  }
}

run "the_machines_of_a_shared_state_get_its_address_and_may_read_its_password_and_no_other" {
  variables {
    shared_state = true
  }

  assert {
    condition     = one([for statement in data.aws_iam_policy_document.machine.statement : statement if statement.sid == "ReadStorePassword"]).resources == toset(["arn:aws:secretsmanager:us-west-1:123456789012:secret:stable-diffusion-store-AbCdEf"])
    error_message = "The role may read this secret only."
  }
  assert {
    condition     = alltrue([for statement in data.aws_iam_policy_document.machine.statement : statement.sid == "ReadStorePassword" || !contains(statement.actions, "secretsmanager:GetSecretValue")])
    error_message = "The role may read no other secret."
  }
  assert {
    condition     = one(aws_elasticache_replication_group.store[0].security_group_ids) == aws_security_group.store[0].id && aws_vpc_security_group_ingress_rule.store_from_machine[0].security_group_id == aws_security_group.store[0].id && aws_vpc_security_group_ingress_rule.store_from_machine[0].referenced_security_group_id == aws_security_group.machine.id && aws_vpc_security_group_egress_rule.machine_to_store[0].referenced_security_group_id == aws_security_group.store[0].id
    error_message = "Only the machines may reach the store."
  }
  assert {
    condition     = nonsensitive(aws_elasticache_replication_group.store[0].auth_token) == "Pass0Word" && nonsensitive(aws_secretsmanager_secret_version.store[0].secret_string) == "Pass0Word"
    error_message = "The store's password must be the one in the secret."
  }
  assert {
    condition     = strcontains(module.boot.plain_user_data, "STORE_ADDRESS='store.example:6379'") && strcontains(module.boot.plain_user_data, "secret:stable-diffusion-store-AbCdEf") && !strcontains(module.boot.plain_user_data, "Pass0Word")
    error_message = "The user data must say where the password is, and not the password."
  }
}

run "one_machine_has_nobody_to_share_its_state_with" {
  command = plan

  variables {
    instances    = { min = 1, max = 1 }
    shared_state = true
  }

  expect_failures = [var.shared_state]
}
