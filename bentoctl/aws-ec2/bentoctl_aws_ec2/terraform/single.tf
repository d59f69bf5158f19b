# Without `instances`: one machine with a fixed address.

resource "aws_instance" "machine" {
  # checkov:skip=CKV2_AWS_41:The launch template sets the role.
  count = local.single ? 1 : 0

  tags = { Name = var.deployment_name }

  # A new version, from a new image, AMI or setting, replaces the machine.
  launch_template {
    id      = aws_launch_template.machine.id
    version = aws_launch_template.machine.latest_version
  }

  # The new machine starts and takes over the address before the old one ends.
  lifecycle {
    create_before_destroy = true
  }

  # Its permissions and its internet access must exist when it boots.
  depends_on = [
    aws_iam_role_policy.machine,
    aws_vpc_security_group_egress_rule.machine_https,
  ]
}

resource "aws_eip" "machine" {
  count  = local.single ? 1 : 0
  domain = "vpc"
}

resource "terraform_data" "machine_ready" {
  count            = local.single ? 1 : 0
  triggers_replace = [aws_instance.machine[0].id]

  provisioner "local-exec" {
    command = "python3 ${path.module}/wait_until_ready.py --region ${var.region} --log-group ${local.log_group} --timeout-s ${local.ready_timeout_s + 300} --instance ${aws_instance.machine[0].id}"
  }
}

resource "aws_eip_association" "machine" {
  count = local.single ? 1 : 0

  instance_id         = aws_instance.machine[0].id
  allocation_id       = aws_eip.machine[0].allocation_id
  allow_reassociation = true

  lifecycle {
    create_before_destroy = true
  }

  depends_on = [terraform_data.machine_ready]
}
