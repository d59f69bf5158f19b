# The cloud-init user data of a machine: its first start and every later one. Needs no provider.

variable "settings" {
  description = "Settings of machine.sh by name."
  type        = map(string)

  validation {
    condition     = alltrue([for value in values(var.settings) : !can(regex("['\\r\\n]", value))])
    error_message = "A setting must not contain a quote or a line break."
  }
}

variable "environment_variables" {
  description = "Environment of the container."
  type        = map(string)
}

variable "stop_timeout_s" {
  description = "How long a stopping container may take to finish the images it has accepted."
  type        = number
}

variable "ready_timeout_s" {
  description = "How long a start may take, the download of the image included."
  type        = number
}

locals {
  units = {
    "stable-diffusion.service"       = templatefile("${path.module}/stable-diffusion.service", { ready_timeout_s = var.ready_timeout_s, stop_timeout_s = var.stop_timeout_s })
    "stable-diffusion-watch.service" = file("${path.module}/stable-diffusion-watch.service")
    "stable-diffusion-watch.timer"   = file("${path.module}/stable-diffusion-watch.timer")
  }

  files = concat(
    [
      { path = "/usr/local/bin/stable-diffusion-machine", permissions = "0755", content = file("${path.module}/machine.sh") },
      { path = "/etc/stable-diffusion/settings", permissions = "0644", content = join("", [for name, value in var.settings : "${name}='${value}'\n"]) },
      { path = "/etc/stable-diffusion/environment", permissions = "0600", content = join("", [for name, value in var.environment_variables : "${name}=${value}\n"]) },
    ],
    [for name, content in local.units : { path = "/etc/systemd/system/${name}", permissions = "0644", content = content }],
  )

  cloud_config = {
    write_files = local.files
    runcmd = [
      ["systemctl", "daemon-reload"],
      # Without waiting: otherwise cloud-init would not finish before the image server is ready.
      ["systemctl", "enable", "--now", "--no-block", "stable-diffusion.service", "stable-diffusion-watch.timer"],
    ]
  }
}

output "user_data" {
  description = "cloud-init user data of a machine, gzipped and in base64."
  value       = base64gzip(local.user_data)
}

output "plain_user_data" {
  description = "The same, readable."
  value       = local.user_data
}

locals {
  user_data = "#cloud-config\n${yamlencode(local.cloud_config)}"
}
