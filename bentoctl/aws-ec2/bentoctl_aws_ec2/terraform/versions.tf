terraform {
  required_version = ">= 1.9" # for validations that use several variables

  required_providers {
    aws = {
      source  = "hashicorp/aws"
      version = "~> 6.25"
    }
  }
}

provider "aws" {
  region = var.region

  default_tags {
    tags = {
      Deployment = var.deployment_name
      ManagedBy  = "bentoctl"
    }
  }
}
