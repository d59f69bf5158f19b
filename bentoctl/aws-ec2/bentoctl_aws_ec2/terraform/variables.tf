# Values come from bentoctl.tfvars, which `bentoctl generate` and `bentoctl build` write from deployment_config.yaml.

variable "deployment_name" {
  description = "Name of the deployment: prefix of all resources, and name of its image repository."
  type        = string

  validation {
    condition     = can(regex("^[a-z](-?[a-z0-9]){1,31}$", var.deployment_name)) && length(var.deployment_name) <= 32
    error_message = "The name must be 2 to 32 lower-case letters, digits and single hyphens, starting with a letter."
  }
}

variable "region" {
  description = "AWS region, such as us-west-1."
  type        = string

  validation {
    condition     = can(regex("^[a-z]{2,4}(-[a-z]+)+-[0-9]+$", var.region))
    error_message = "The region must look like us-west-1."
  }
}

variable "image_tag" {
  description = "The image in Amazon ECR, REGISTRY/REPOSITORY:VERSION, as `bentoctl build` pushed it."
  type        = string

  validation {
    condition     = var.image_tag != ""
    error_message = "There is no image yet: run `bentoctl build -b BENTO:VERSION -f deployment_config.yaml` first."
  }
  validation {
    condition     = var.image_tag == "" || can(regex("^[0-9]{12}\\.dkr\\.ecr\\.[a-z0-9-]+\\.amazonaws\\.com(\\.cn)?/[a-z0-9-]+:[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}$", var.image_tag))
    error_message = "The image must be ACCOUNT.dkr.ecr.REGION.amazonaws.com/NAME:VERSION, without a port or a nested name."
  }
  validation {
    condition     = var.image_tag == "" || strcontains(var.image_tag, ".ecr.${var.region}.")
    error_message = "The image is in another region than the deployment: run `bentoctl build` again."
  }
}

variable "instance_type" {
  description = "EC2 instance type with an x86_64 processor, and with NVIDIA GPUs if enable_gpus is true."
  type        = string

  validation {
    condition     = can(regex("^[a-z0-9-]+\\.[a-z0-9-]+$", var.instance_type))
    error_message = "The instance type must look like g4dn.xlarge."
  }
}

variable "enable_gpus" {
  description = "Whether the container gets the machine's NVIDIA GPUs."
  type        = bool
}

variable "ami_id" {
  description = "Machine image to use instead of the current AWS Deep Learning Base GPU AMI (Ubuntu 24.04); it needs Docker, the AWS CLI and, for GPUs, the NVIDIA driver and container toolkit."
  type        = string
  nullable    = true

  validation {
    condition     = var.ami_id == null || can(regex("^ami-([0-9a-f]{8}|[0-9a-f]{17})$", var.ami_id))
    error_message = "The AMI id must be ami- and 8 or 17 hexadecimal digits."
  }
}

variable "disk_size_gb" {
  description = "Size of the encrypted root disk in GiB, for the AMI and the image, packed and unpacked."
  type        = number

  validation {
    condition     = var.disk_size_gb >= 100 && var.disk_size_gb <= 16384 && floor(var.disk_size_gb) == var.disk_size_gb
    error_message = "The disk must have 100 to 16384 GiB."
  }
}

variable "spot" {
  description = "Whether to use spot machines, which are cheaper but which AWS may stop at two minutes' notice."
  type        = bool
}

variable "idle_stop_minutes" {
  description = "Minutes without a request after which the machine stops itself; 0: never."
  type        = number

  validation {
    condition     = var.idle_stop_minutes == 0 || (var.idle_stop_minutes >= 15 && var.idle_stop_minutes <= 10080)
    error_message = "idle_stop_minutes must be 0 (never) or 15 to 10080."
  }
  validation {
    condition     = var.idle_stop_minutes == 0 || (var.instances == null && !var.spot)
    error_message = "idle_stop_minutes works only for a single machine that is not a spot machine."
  }
}

variable "instances" {
  description = "Minimum and maximum number of machines behind a load balancer; null: one machine with a fixed address and no load balancer."
  type        = object({ min = number, max = number })
  nullable    = true

  validation {
    condition     = var.instances == null || try(var.instances.min >= 1 && var.instances.max <= 100 && var.instances.min <= var.instances.max, false)
    error_message = "instances needs 1 <= min <= max <= 100."
  }
}

variable "shared_state" {
  description = "Whether the machines share jobs, idempotency keys and limits through a Valkey of Amazon ElastiCache."
  type        = bool

  validation {
    condition     = !var.shared_state || try(var.instances.max > 1, false)
    error_message = "shared_state needs several machines: instances with a max of 2 or more."
  }
}

variable "certificate_arn" {
  description = "ACM certificate of the load balancer's HTTPS; null: HTTP."
  type        = string
  nullable    = true

  validation {
    condition     = var.certificate_arn == null || can(regex("^arn:aws[a-z-]*:acm:[a-z0-9-]+:[0-9]{12}:certificate/[0-9a-f-]+$", var.certificate_arn))
    error_message = "This is not the ARN of an ACM certificate."
  }
  validation {
    condition     = var.certificate_arn == null || var.instances != null
    error_message = "A certificate needs a load balancer, so set instances (min 1 and max 1 for one machine)."
  }
}

variable "allowed_cidrs" {
  description = "IPv4 blocks that may reach the server; empty: only SSM sessions can."
  type        = list(string)

  validation {
    condition     = alltrue([for block in var.allowed_cidrs : can(cidrnetmask(block))])
    error_message = "Each of allowed_cidrs must be an IPv4 block such as 203.0.113.7/32."
  }
}

variable "subnet_ids" {
  description = "Public subnets of your own VPC; empty: those of the region's default VPC."
  type        = list(string)

  validation {
    condition     = alltrue([for id in var.subnet_ids : can(regex("^subnet-([0-9a-f]{8}|[0-9a-f]{17})$", id))])
    error_message = "Each of subnet_ids must be subnet- and 8 or 17 hexadecimal digits."
  }
  validation {
    condition     = var.instances == null || length(var.subnet_ids) != 1
    error_message = "A load balancer needs subnets in at least two availability zones."
  }
}

variable "api_key_arn" {
  description = "Secrets Manager secret or SSM parameter that the machine reads at each start and passes to the container as SD_API_KEYS; null: no keys."
  type        = string
  nullable    = true

  validation {
    condition     = var.api_key_arn == null || can(regex("^arn:aws[a-z-]*:(secretsmanager:[a-z0-9-]+:[0-9]{12}:secret:|ssm:[a-z0-9-]+:[0-9]{12}:parameter/)", var.api_key_arn))
    error_message = "This is neither the ARN of a Secrets Manager secret nor that of an SSM parameter."
  }
}

variable "environment_variables" {
  description = "Environment of the container. Not for secrets: it is in the machine's user data."
  type        = map(string)

  validation {
    condition     = alltrue([for name, value in var.environment_variables : can(regex("^[A-Za-z_][A-Za-z0-9_]*$", name)) && !can(regex("[\\r\\n]", value))])
    error_message = "Names must consist of letters, digits and _; values must be a single line."
  }
}
