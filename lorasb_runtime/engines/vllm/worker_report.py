"""What our engine asks of a worker beyond vLLM's own calls: a mixin, by `worker_extension_cls`."""

from lorasb_runtime.engines.vllm.manager import SharedBasisManager
from lorasb_runtime.errors import EngineError


class WorkerReport:
    """Each name here is one more that the worker can be asked for by `collective_rpc`."""

    def lorasb_slots(self) -> tuple[int, int, int, int]:
        """Resident versions; slot hits, fills and evictions since the start.

        Raises EngineError in a worker that runs without the plugin.
        """
        manager = getattr(self.model_runner, "lora_manager", None)  # type: ignore[attr-defined]
        if not isinstance(manager, SharedBasisManager):
            raise EngineError("a worker runs without lorasb's plugin; is lorasb installed there?")
        slots = manager.resident.slots
        return slots.used, slots.hits, sum(slots.fills), slots.evictions
