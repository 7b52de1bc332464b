"""All services on one machine, as processes that are restarted when they die and never outlive their supervisor."""

from alora_serve.cli.local.deployment import DeploymentOptions, LocalDeployment
from alora_serve.cli.local.events import ProcessEvent

__all__ = ["DeploymentOptions", "LocalDeployment", "ProcessEvent"]
