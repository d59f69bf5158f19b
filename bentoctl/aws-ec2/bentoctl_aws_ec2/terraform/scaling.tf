# With `instances`: when the group grows and shrinks, and how a machine leaves it.
#
# Requests in progress do not tell how long they take, and jobs that wait in a shared queue are none. So every ready machine reports once a
# minute for how many seconds it still has work (stable_diffusion_backlog_seconds: its own, and its share of the shared queue), and whether
# it is generating (0 or 100).

# Grows. The average over the machines is the work of the whole group divided by their number, so it falls as the number rises, which target
# tracking needs: for three times the target it asks for three times the machines. It may not shrink the group: machines that are always
# busy, but whose queue is short, would look as if there were too many.
resource "aws_autoscaling_policy" "work_waiting" {
  count = local.single ? 0 : 1

  name                   = "work-waiting"
  autoscaling_group_name = aws_autoscaling_group.machine[0].name
  policy_type            = "TargetTrackingScaling"

  target_tracking_configuration {
    target_value     = local.backlog_s_per_machine
    disable_scale_in = true

    customized_metric_specification {
      namespace   = local.metric_namespace
      metric_name = local.backlog_metric
      statistic   = "Average"

      metric_dimension {
        name  = "AutoScalingGroupName"
        value = var.deployment_name
      }
    }
  }
}

# Shrinks, by one machine every quarter of an hour.
resource "aws_autoscaling_policy" "machine_to_spare" {
  count = local.single ? 0 : 1

  name                   = "machine-to-spare"
  autoscaling_group_name = aws_autoscaling_group.machine[0].name
  policy_type            = "SimpleScaling"
  adjustment_type        = "ChangeInCapacity"
  scaling_adjustment     = -1
  cooldown               = 900
}

# A quarter of an hour of reports from each machine says how busy they are. With one machine fewer the same work keeps the others busy
# for machines / (machines - 1) of that share of the time; the last machine counts as fully busy.
resource "aws_cloudwatch_metric_alarm" "machine_to_spare" {
  count = local.single ? 0 : 1

  alarm_name          = "${var.deployment_name}-machine-to-spare"
  alarm_description   = "The machines of ${var.deployment_name} could do their work with one fewer."
  comparison_operator = "LessThanThreshold"
  threshold           = local.busy_percent_after_leaving
  evaluation_periods  = 1
  treat_missing_data  = "notBreaching"
  alarm_actions       = [aws_autoscaling_policy.machine_to_spare[0].arn]

  metric_query {
    id          = "busy_after_leaving"
    label       = "How busy the others would be, in per cent"
    expression  = "IF(machines > 1, busy * machines / (machines - 1), 100)"
    return_data = true
  }
  metric_query {
    id = "busy"

    metric {
      namespace   = local.metric_namespace
      metric_name = local.busy_metric
      dimensions  = { AutoScalingGroupName = var.deployment_name }
      stat        = "Average"
      period      = 900
    }
  }
  metric_query {
    id = "machines"

    metric {
      namespace   = "AWS/AutoScaling"
      metric_name = "GroupInServiceInstances"
      dimensions  = { AutoScalingGroupName = var.deployment_name }
      stat        = "Average"
      period      = 900
    }
  }
}

# A machine that is to leave is not ended before it has finished what it accepted. The load balancer waits for its requests only, not for
# jobs that nobody is waiting for; machine.sh sees that the machine is to leave, stops the server, which finishes them all, and lets go.
resource "aws_autoscaling_lifecycle_hook" "leave" {
  count = local.single ? 0 : 1

  name                   = local.leave_hook
  autoscaling_group_name = aws_autoscaling_group.machine[0].name
  lifecycle_transition   = "autoscaling:EC2_INSTANCE_TERMINATING"
  heartbeat_timeout      = local.leave_timeout_s
  default_result         = "CONTINUE"
}
