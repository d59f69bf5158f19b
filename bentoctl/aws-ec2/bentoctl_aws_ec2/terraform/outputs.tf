locals {
  address = local.single ? aws_eip.machine[0].public_ip : aws_lb.balancer[0].dns_name
  url     = "${local.scheme}://${local.address}"
}

output "region" {
  description = "Endpoint of the deployment."
  value       = var.region
}

output "endpoint" {
  description = "Address of the server. With a certificate, point a DNS name that it covers at this address and use that name."
  value       = local.url
}

output "swagger" {
  description = "Page to try every endpoint in the browser."
  value       = "${local.url}/"
}

output "curl" {
  description = "Command that generates a first image; KEY stands for an API key."
  value       = "curl -X POST ${local.url}/txt2img${local.has_keys ? " -H 'X-API-Key: KEY'" : ""} -H 'Content-Type: application/json' -d '{\"prompt\":\"View of a cyberpunk city\"}' --output output.jpg"
}

output "log_group" {
  description = "CloudWatch log group: a stream INSTANCE/boot and a stream INSTANCE/container for each machine."
  value       = local.log_group
}

output "logs_command" {
  description = "Command that follows the logs of all machines."
  value       = "aws logs tail ${local.log_group} --follow --region ${var.region}"
}

output "session_command" {
  description = "Command that opens a shell on the machine through SSM; with several machines, it lists them first."
  value = local.single ? "aws ssm start-session --region ${var.region} --target ${aws_instance.machine[0].id}" : join("", [
    "aws autoscaling describe-auto-scaling-instances --region ${var.region} --query ",
    "\"AutoScalingInstances[?AutoScalingGroupName=='${var.deployment_name}'].InstanceId\" --output text",
    " # then: aws ssm start-session --region ${var.region} --target INSTANCE",
  ])
}

output "tunnel_command" {
  description = "Command that forwards port 3000 of this computer to the server through SSM, for an empty allowed_cidrs; null with several machines."
  value = local.single ? join(" ", [
    "aws ssm start-session --region ${var.region} --target ${aws_instance.machine[0].id}",
    "--document-name AWS-StartPortForwardingSession --parameters portNumber=${local.port},localPortNumber=3000",
  ]) : null
}

output "start_command" {
  description = "Command that starts the stopped machine again, with the same address; null with several machines."
  value       = local.single ? "aws ec2 start-instances --region ${var.region} --instance-ids ${aws_instance.machine[0].id}" : null
}

output "stop_command" {
  description = "Command that stops the machine, which then costs only its disk and its address; null with several machines."
  value       = local.single ? "aws ec2 stop-instances --region ${var.region} --instance-ids ${aws_instance.machine[0].id}" : null
}

output "ami" {
  description = "The machine image in use."
  value       = "${data.aws_ami.machine.id} (${data.aws_ami.machine.name})"
}
