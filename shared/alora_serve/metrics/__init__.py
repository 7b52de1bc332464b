"""Every Prometheus metric, declared in one place. Algorithms report through small Protocols that these classes meet.

Names begin with ``alora_``; counters end in ``_total``, durations in ``_seconds``, sizes in ``_bytes``. Only counters,
histograms and gauges of a current state: rates and means are for PromQL, but for those that the code itself decides by.
A label whose values the code knows is typed as a ``Literal`` of them, and its series are there from the start, at 0:
``increase()`` then sees the first event.
"""

from alora_serve.metrics.adapters import AdapterMetrics
from alora_serve.metrics.engine import CoreMetrics, EngineMetrics
from alora_serve.metrics.http import HttpMetrics
from alora_serve.metrics.inference_extension import InferenceExtensionMetrics
from alora_serve.metrics.process import CertificateMetrics, RpcMetrics, TaskMetrics, service_registry
from alora_serve.metrics.requests import RequestMetrics, TokenTimes
from alora_serve.metrics.router import EndpointRole, EndpointState, RouterMetrics
from alora_serve.metrics.store import StoreMetrics

__all__ = [
    "AdapterMetrics",
    "CertificateMetrics",
    "CoreMetrics",
    "EndpointRole",
    "EndpointState",
    "EngineMetrics",
    "HttpMetrics",
    "InferenceExtensionMetrics",
    "RequestMetrics",
    "RouterMetrics",
    "RpcMetrics",
    "StoreMetrics",
    "TaskMetrics",
    "TokenTimes",
    "service_registry",
]
