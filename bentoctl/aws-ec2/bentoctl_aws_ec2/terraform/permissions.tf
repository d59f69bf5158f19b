# The machine's permissions.

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
  # checkov:skip=CKV_AWS_111:Sessions, logins and metrics do not support resources, see below.
  # checkov:skip=CKV_AWS_356:Sessions, logins and metrics do not support resources, see below.
  # GetAuthorizationToken, PutMetricData and sessions do not support resources; a condition limits metrics to one namespace.
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

  # SSM sessions replace SSH: no key, no open port. AWS's own policy for them would also let the machine read every parameter of the
  # account.
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
      sid       = "JoinAndLeaveTheGroup"
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
    for_each = var.shared_state ? [local.store_password_arn] : []
    content {
      sid       = "ReadStorePassword"
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
