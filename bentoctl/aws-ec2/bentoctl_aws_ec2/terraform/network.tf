# Security groups: which traffic is allowed.

resource "aws_security_group" "machine" {
  name_prefix = "${var.deployment_name}-machine-"
  description = "Machines of ${var.deployment_name}"
  vpc_id      = local.vpc_id

  lifecycle {
    create_before_destroy = true
  }
}

resource "aws_vpc_security_group_egress_rule" "machine_https" {
  security_group_id = aws_security_group.machine.id
  description       = "AWS APIs and the image registry"
  ip_protocol       = "tcp"
  from_port         = 443
  to_port           = 443
  cidr_ipv4         = "0.0.0.0/0"
}

resource "aws_vpc_security_group_egress_rule" "machine_updates" {
  security_group_id = aws_security_group.machine.id
  description       = "Signed operating system packages, which mirrors serve over HTTP"
  ip_protocol       = "tcp"
  from_port         = 80
  to_port           = 80
  cidr_ipv4         = "0.0.0.0/0"
}

resource "aws_vpc_security_group_egress_rule" "machine_to_store" {
  count = var.shared_state ? 1 : 0

  security_group_id            = aws_security_group.machine.id
  description                  = "The Valkey that machines share"
  ip_protocol                  = "tcp"
  from_port                    = local.store_port
  to_port                      = local.store_port
  referenced_security_group_id = aws_security_group.store[0].id
}

resource "aws_security_group" "store" {
  count = var.shared_state ? 1 : 0

  name_prefix = "${var.deployment_name}-store-"
  description = "The Valkey that the machines of ${var.deployment_name} share"
  vpc_id      = local.vpc_id

  lifecycle {
    create_before_destroy = true
  }
}

resource "aws_vpc_security_group_ingress_rule" "store_from_machine" {
  count = var.shared_state ? 1 : 0

  security_group_id            = aws_security_group.store[0].id
  description                  = "Machines"
  ip_protocol                  = "tcp"
  from_port                    = local.store_port
  to_port                      = local.store_port
  referenced_security_group_id = aws_security_group.machine.id
}

resource "aws_vpc_security_group_ingress_rule" "machine" {
  for_each = toset(local.single ? var.allowed_cidrs : [])

  security_group_id = aws_security_group.machine.id
  description       = "Image server"
  ip_protocol       = "tcp"
  from_port         = local.port
  to_port           = local.port
  cidr_ipv4         = each.value
}

resource "aws_vpc_security_group_ingress_rule" "machine_from_balancer" {
  # checkov:skip=CKV_AWS_260:It admits only the load balancer's security group, no addresses.
  count = local.single ? 0 : 1

  security_group_id            = aws_security_group.machine.id
  description                  = "Load balancer"
  ip_protocol                  = "tcp"
  from_port                    = local.port
  to_port                      = local.port
  referenced_security_group_id = aws_security_group.balancer[0].id
}

resource "aws_security_group" "balancer" {
  count = local.single ? 0 : 1

  name_prefix = "${var.deployment_name}-balancer-"
  description = "Load balancer of ${var.deployment_name}"
  vpc_id      = local.vpc_id

  lifecycle {
    create_before_destroy = true
  }
}

resource "aws_vpc_security_group_egress_rule" "balancer_to_machine" {
  count = local.single ? 0 : 1

  security_group_id            = aws_security_group.balancer[0].id
  description                  = "Machines"
  ip_protocol                  = "tcp"
  from_port                    = local.port
  to_port                      = local.port
  referenced_security_group_id = aws_security_group.machine.id
}

resource "aws_vpc_security_group_ingress_rule" "balancer" {
  for_each = toset(local.single ? [] : var.allowed_cidrs)

  security_group_id = aws_security_group.balancer[0].id
  description       = "Image server"
  ip_protocol       = "tcp"
  from_port         = local.public_port
  to_port           = local.public_port
  cidr_ipv4         = each.value
}
