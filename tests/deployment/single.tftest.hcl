# What Terraform would make for one machine. Every provider is mocked: nothing is asked of AWS.

mock_provider "aws" {
  source = "./mocks"
}

run "one_machine_with_a_fixed_address" {
  command = plan

  assert {
    condition     = length(aws_instance.machine) == 1 && length(aws_eip.machine) == 1 && length(aws_eip_association.machine) == 1
    error_message = "There must be one machine with one address."
  }
  assert {
    condition     = length(aws_elasticache_replication_group.store) == 0 && length(aws_lb.balancer) == 0 && length(aws_autoscaling_group.machine) == 0 && length(aws_security_group.balancer) == 0
    error_message = "There must be no load balancer and no Valkey."
  }
  assert {
    condition     = aws_launch_template.machine.network_interfaces[0].subnet_id == "subnet-0000000a"
    error_message = "The subnet must be the same in every plan, in whatever order AWS lists them."
  }
  assert {
    condition     = aws_launch_template.machine.metadata_options[0].http_tokens == "required" && aws_launch_template.machine.metadata_options[0].http_put_response_hop_limit == 1
    error_message = "The metadata service must be IMDSv2 only and unreachable from the container."
  }
  assert {
    condition     = aws_launch_template.machine.block_device_mappings[0].ebs[0].encrypted == "true" && aws_launch_template.machine.block_device_mappings[0].ebs[0].volume_type == "gp3" && aws_launch_template.machine.block_device_mappings[0].ebs[0].volume_size == 120 && aws_launch_template.machine.block_device_mappings[0].device_name == "/dev/sda1"
    error_message = "The root disk must be encrypted gp3 of the configured size."
  }
  assert {
    condition     = aws_launch_template.machine.image_id == "ami-0fedcba9876543210"
    error_message = "The AMI must be the one that SSM names."
  }
  assert {
    condition     = keys(aws_vpc_security_group_ingress_rule.machine) == ["203.0.113.7/32"]
    error_message = "Exactly the allowed blocks may reach the server."
  }
  assert {
    condition     = aws_vpc_security_group_egress_rule.machine_https.to_port == 443 && aws_vpc_security_group_egress_rule.machine_updates.to_port == 80
    error_message = "Outgoing traffic must be HTTPS, and HTTP for packages."
  }
  assert {
    condition     = length(aws_launch_template.machine.instance_market_options) == 0
    error_message = "The machine must be on demand by default."
  }
  assert {
    condition     = length(setsubtract([for statement in data.aws_iam_policy_document.machine.statement : statement.sid], ["LogInToRegistry", "PullImage", "WriteLogs", "OpenSessions"])) == 0
    error_message = "The role may pull, log, open sessions and nothing else."
  }
  assert {
    condition     = one([for statement in data.aws_iam_policy_document.machine.statement : statement.resources if statement.sid == "PullImage"]) == toset(["arn:aws:ecr:us-west-1:123456789012:repository/stable-diffusion"])
    error_message = "The role may pull from this repository only."
  }
}

run "the_outputs_lead_to_the_machine" {
  assert {
    condition     = output.endpoint == "http://198.51.100.7" && output.swagger == "http://198.51.100.7/"
    error_message = "The endpoint must be the fixed address."
  }
  assert {
    condition     = strcontains(output.curl, "curl -X POST http://198.51.100.7/txt2img -H 'Content-Type: application/json'")
    error_message = "The outputs must have a curl command."
  }
  assert {
    condition     = strcontains(output.session_command, "aws ssm start-session --region us-west-1 --target ") && strcontains(output.tunnel_command, "portNumber=80,localPortNumber=3000")
    error_message = "The outputs must have commands for a shell and a tunnel through SSM."
  }
  assert {
    condition     = output.log_group == "/bentoctl/stable-diffusion"
    error_message = "The outputs must have the log group."
  }
  assert {
    condition     = strcontains(output.start_command, "start-instances") && strcontains(output.stop_command, "stop-instances")
    error_message = "The outputs must have commands to stop and start the machine."
  }
}

run "a_pinned_ami_is_not_looked_up" {
  command = plan

  variables {
    ami_id = "ami-0123456789abcdef0"
  }

  assert {
    condition     = length(data.aws_ssm_parameter.deep_learning_ami) == 0 && one(data.aws_ami.machine.filter).values == toset(["ami-0123456789abcdef0"])
    error_message = "ami_id must replace the lookup."
  }
}

run "own_subnets_need_no_default_vpc" {
  command = plan

  variables {
    subnet_ids = ["subnet-01234567"]
  }

  assert {
    condition     = length(data.aws_vpc.default) == 0 && aws_launch_template.machine.network_interfaces[0].subnet_id == "subnet-01234567"
    error_message = "The machine must be in the configured subnet."
  }
}

run "a_spot_machine_comes_back_by_itself" {
  command = plan

  variables {
    spot = true
  }

  assert {
    condition     = aws_launch_template.machine.instance_market_options[0].market_type == "spot" && aws_launch_template.machine.instance_market_options[0].spot_options[0].spot_instance_type == "persistent" && aws_launch_template.machine.instance_market_options[0].spot_options[0].instance_interruption_behavior == "stop"
    error_message = "AWS must stop the machine on interruption and start it when capacity returns."
  }
}

run "the_machine_may_read_its_api_key_and_no_other" {
  command = plan

  variables {
    api_key_arn = "arn:aws:secretsmanager:us-west-1:123456789012:secret:key-AbCdEf"
  }

  assert {
    condition     = one([for statement in data.aws_iam_policy_document.machine.statement : statement if statement.sid == "ReadApiKey"]).resources == toset(["arn:aws:secretsmanager:us-west-1:123456789012:secret:key-AbCdEf"])
    error_message = "The role may read this secret only."
  }
}

run "the_curl_line_has_a_key_where_the_server_has_keys" {
  variables {
    environment_variables = { SD_API_KEYS = "alice:sha256:0000000000000000000000000000000000000000000000000000000000000000" }
  }

  assert {
    condition     = strcontains(output.curl, "/txt2img -H 'X-API-Key: KEY' -H 'Content-Type: application/json'")
    error_message = "The curl command must have a key whichever way the keys are set."
  }
}

run "an_ssm_parameter_serves_as_well" {
  command = plan

  variables {
    api_key_arn = "arn:aws:ssm:us-west-1:123456789012:parameter/key"
  }

  assert {
    condition     = one([for statement in data.aws_iam_policy_document.machine.statement : statement if statement.sid == "ReadApiKey"]).actions == toset(["ssm:GetParameter"])
    error_message = "The role may read this parameter only."
  }
}

run "an_ami_from_before_the_driver_is_refused" {
  command = plan

  override_data {
    target = data.aws_ami.machine
    values = { id = "ami-0a85a3a3fb34b3c7f", name = "Deep Learning AMI GPU PyTorch 1.12.0 (Ubuntu 20.04) 20220913", architecture = "x86_64", creation_date = "2022-09-13T10:00:00.000Z", root_device_name = "/dev/sda1", block_device_mappings = [] }
  }

  expect_failures = [data.aws_ami.machine]
}

run "an_ami_for_arm_is_refused" {
  command = plan

  override_data {
    target = data.aws_ami.machine
    values = { id = "ami-0a85a3a3fb34b3c7f", name = "arm", architecture = "arm64", creation_date = "2026-09-13T10:00:00.000Z", root_device_name = "/dev/sda1", block_device_mappings = [] }
  }

  expect_failures = [data.aws_ami.machine]
}

run "a_disk_smaller_than_the_ami_is_refused" {
  command = plan

  override_data {
    target = data.aws_ami.machine
    values = { id = "ami-0a85a3a3fb34b3c7f", name = "large", architecture = "x86_64", creation_date = "2026-09-13T10:00:00.000Z", root_device_name = "/dev/sda1", block_device_mappings = [{ device_name = "/dev/sda1", ebs = { volume_size = "200" }, no_device = "", virtual_name = "" }] }
  }

  expect_failures = [data.aws_ami.machine]
}

run "a_type_without_a_gpu_is_refused_where_gpus_are_asked_for" {
  command = plan

  override_data {
    target = data.aws_ec2_instance_type.machine
    values = { supported_architectures = ["x86_64"], gpus = [] }
  }

  expect_failures = [data.aws_ec2_instance_type.machine]
}

run "a_type_that_the_region_does_not_have_is_refused" {
  command = plan

  override_data {
    target = data.aws_ec2_instance_type_offerings.zones
    values = { locations = [] }
  }

  expect_failures = [data.aws_ec2_instance_type_offerings.zones]
}

run "values_that_no_operator_wrote_are_refused_too" {
  command = plan

  variables {
    deployment_name       = "Stable Diffusion"
    image_tag             = "localhost:5000/stable-diffusion:1"
    ami_id                = "ami-1"
    disk_size_gb          = 8
    idle_stop_minutes     = 5
    certificate_arn       = "arn:aws:iam::123456789012:server-certificate/x"
    allowed_cidrs         = ["everybody"]
    subnet_ids            = ["vpc-1"]
    api_key_arn           = "secret"
    environment_variables = { "A B" = "1" }
  }

  expect_failures = [
    var.deployment_name, var.image_tag, var.ami_id, var.disk_size_gb, var.idle_stop_minutes,
    var.certificate_arn, var.allowed_cidrs, var.subnet_ids, var.api_key_arn, var.environment_variables,
  ]
}

run "a_single_machine_with_shared_state_is_refused_too" {
  command = plan

  variables {
    shared_state = true
  }

  expect_failures = [var.shared_state]
}

run "fewest_above_most_is_refused_too" {
  command = plan

  variables {
    instances = { min = 3, max = 1 }
  }

  expect_failures = [var.instances]
}

run "an_apply_before_the_first_build_says_what_to_do" {
  command = plan

  variables {
    image_tag = ""
  }

  expect_failures = [var.image_tag]
}
