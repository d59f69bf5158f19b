# Looks up what exists already: the image, the AMI, the network.

data "aws_caller_identity" "current" {}

data "aws_partition" "current" {}

# By digest, so that pushing a tag again replaces the machine too.
data "aws_ecr_image" "server" {
  repository_name = local.image_repository
  image_tag       = local.image_version
}

data "aws_ssm_parameter" "deep_learning_ami" {
  count = var.ami_id == null ? 1 : 0
  name  = "/aws/service/deeplearning/ami/x86_64/base-oss-nvidia-driver-gpu-ubuntu-24.04/latest/ami-id"
}

data "aws_ami" "machine" {
  # AWS deprecates public AMIs after two years at most; the checks below refuse those that are too old.
  include_deprecated = true

  filter {
    name   = "image-id"
    values = [var.ami_id == null ? data.aws_ssm_parameter.deep_learning_ami[0].insecure_value : var.ami_id]
  }

  lifecycle {
    postcondition {
      condition     = self.architecture == "x86_64"
      error_message = "The AMI ${self.id} (${self.name}) is for ${self.architecture}, but the image is built for x86_64."
    }
    postcondition {
      condition     = !var.enable_gpus || timecmp(self.creation_date, local.oldest_ami_date) >= 0
      error_message = "The AMI ${self.id} (${self.name}) was made on ${substr(self.creation_date, 0, 10)}; torch's CUDA 13 needs NVIDIA driver ${local.minimum_driver_major}, which was released later. Use a newer ami_id, or leave it out."
    }
    postcondition {
      condition     = alltrue([for device in self.block_device_mappings : try(tonumber(device.ebs.volume_size), 0) <= var.disk_size_gb if device.device_name == self.root_device_name])
      error_message = "The AMI ${self.id} (${self.name}) needs a root disk larger than disk_size_gb = ${var.disk_size_gb}."
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
