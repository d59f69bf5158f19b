# The values that AWS returns in the Terraform tests.

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
mock_data "aws_secretsmanager_random_password" {
  defaults = { random_password = "Pass0Word" }
}
mock_resource "aws_secretsmanager_secret" {
  defaults = { arn = "arn:aws:secretsmanager:us-west-1:123456789012:secret:stable-diffusion-store-AbCdEf" }
}
mock_resource "aws_elasticache_replication_group" {
  defaults = { primary_endpoint_address = "store.example" }
}
mock_resource "aws_autoscaling_policy" {
  defaults = { arn = "arn:aws:autoscaling:us-west-1:123456789012:scalingPolicy:0123:autoScalingGroupName/sd:policyName/sd" }
}
