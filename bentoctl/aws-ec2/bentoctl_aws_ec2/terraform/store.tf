# With `shared_state`: the Valkey that the machines share, as docs/fleet.md describes, and its password.

locals {
  store_address      = var.shared_state ? "${aws_elasticache_replication_group.store[0].primary_endpoint_address}:${local.store_port}" : ""
  store_password_arn = var.shared_state ? aws_secretsmanager_secret.store[0].arn : ""
}

# AWS makes up the password. Every plan reads another one here; only the first is used, because the secret's version ignores changes until
# somebody replaces it.
data "aws_secretsmanager_random_password" "store" {
  count = var.shared_state ? 1 : 0

  password_length            = 64
  exclude_punctuation        = true # so that it can stand in a URL
  require_each_included_type = true
}

resource "aws_secretsmanager_secret" "store" {
  # checkov:skip=CKV_AWS_149:AWS's own key encrypts it; a customer-managed key would only add costs.
  # checkov:skip=CKV2_AWS_57:Machines read it when they start, so a rotation on a schedule would shut out those that run.
  count = var.shared_state ? 1 : 0

  # A generated name: that of a deleted secret stays taken for a while.
  name_prefix             = "${var.deployment_name}-store-"
  description             = "Password of the Valkey of ${var.deployment_name}"
  recovery_window_in_days = 0 # it is of no use without its Valkey
}

resource "aws_secretsmanager_secret_version" "store" {
  count = var.shared_state ? 1 : 0

  secret_id     = aws_secretsmanager_secret.store[0].id
  secret_string = data.aws_secretsmanager_random_password.store[0].random_password

  lifecycle {
    ignore_changes = [secret_string]
  }
}

resource "aws_elasticache_subnet_group" "store" {
  count = var.shared_state ? 1 : 0

  name        = var.deployment_name
  description = "Subnets of ${var.deployment_name}"
  subnet_ids  = local.subnet_ids
}

resource "aws_elasticache_parameter_group" "store" {
  count = var.shared_state ? 1 : 0

  name        = var.deployment_name
  description = "Valkey of ${var.deployment_name}"
  family      = "valkey7"

  # A full store must refuse new jobs. By default ElastiCache would delete images and idempotency keys that were promised.
  parameter {
    name  = "maxmemory-policy"
    value = "noeviction"
  }
  # AWS advises 30 % for small burstable nodes, so that a replica can be filled while jobs go on.
  parameter {
    name  = "reserved-memory-percent"
    value = "30"
  }
}

resource "aws_elasticache_replication_group" "store" {
  # checkov:skip=CKV_AWS_191:AWS's own key encrypts it; a customer-managed key would only add costs.
  count = var.shared_state ? 1 : 0

  replication_group_id = var.deployment_name
  description          = "Jobs and limits that the machines of ${var.deployment_name} share"
  engine               = "valkey"
  # Of the versions that ElastiCache has, the one closest to the Redis 7 that the server is tested with.
  engine_version       = "7.2"
  node_type            = local.store_node_type
  port                 = local.store_port
  parameter_group_name = aws_elasticache_parameter_group.store[0].name
  subnet_group_name    = aws_elasticache_subnet_group.store[0].name
  security_group_ids   = [aws_security_group.store[0].id]

  # The machines are in two zones or more, so the store must survive the loss of one: a primary and a replica in another zone, which takes
  # over by itself. The machines find it under the same name. ElastiCache has no append-only file for this: the replica is all there is.
  num_cache_clusters         = local.store_nodes
  automatic_failover_enabled = true
  multi_az_enabled           = true

  at_rest_encryption_enabled = true
  transit_encryption_enabled = true
  auth_token                 = aws_secretsmanager_secret_version.store[0].secret_string
  auth_token_update_strategy = "ROTATE"

  # Jobs live for a day at most; a backup would keep prompts and images for longer than the server does.
  snapshot_retention_limit = 0
  apply_immediately        = true
}
