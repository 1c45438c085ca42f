"""What every worker of ours adds to vLLM's: the step it runs is open to the model it runs."""

from collections.abc import Mapping
from typing import Any

from raee_serve.checkpoints import local_checkpoint
from raee_serve.engine.compat import check_attention, check_engine
from raee_serve.engine.kv_cache import split_by_depth
from raee_serve.engine.models import SUPPORTED
from raee_serve.engine.models.truncated import TruncatedExecution
from raee_serve.engine.probe_head import ProbeBank
from raee_serve.engine.scheduler import Exits
from raee_serve.engine.settings import SHORTCUTS_KEY, exit_points, kv_segments, shortcuts_of
from raee_serve.fingerprint import identify_backbone
from raee_serve.shortcuts import Shortcut


class TruncatingWorker:
    """Goes before vLLM's worker class."""

    def __init__(self, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
        check_engine(vllm_config)
        super().__init__(vllm_config, *args, **kwargs)

    def load_model(self, **kwargs: Any) -> None:
        super().load_model(**kwargs)
        model = _truncated_model(self.model_runner.get_model())
        shortcuts = self._shortcuts()
        num_layers = self.model_config.get_total_num_hidden_layers()
        if self.use_v2_model_runner:
            from raee_serve_patches.v2_step import V2Step

            check_attention(self.vllm_config)
            self.step = V2Step(
                self.model_runner,
                model.model,
                Exits(num_layers, frozenset(shortcuts)),
                exit_points(self.vllm_config.additional_config, num_layers),
            )
        else:
            from raee_serve_patches.v1_step import V1Step

            self.step = V1Step(self.model_runner, num_layers)
        config = self.model_config
        self.probes = ProbeBank(config.get_hidden_size(), config.get_vocab_size(), self.device)
        model.attach(self.step.source, shortcuts, self.probes)

    def load_probes(self, set_id: str, packed: bytes) -> None:
        """Hold the probes of `packed` (`exits.probes.packed`) as `set_id`, beside other sets.

        Raises TableError, and changes nothing, where the set is unusable. This and the next method
        are called through `collective_rpc`, between two steps.
        """
        self.probes.load(set_id, packed)

    def unload_probes(self, set_id: str) -> None:
        """Forget a probe set; requests that still ask for it answer `NO_LABEL`."""
        self.probes.unload(set_id)

    def _shortcuts(self) -> Mapping[int, Shortcut]:
        """The engine's exit shortcuts. Raises TableError, a BindingError for another backbone's."""
        shortcuts = shortcuts_of(self.vllm_config.additional_config)
        if shortcuts is None:
            return {}
        backbone = identify_backbone(local_checkpoint(self.model_config.model))
        shortcuts.check_backbone(backbone, self.vllm_config.additional_config[SHORTCUTS_KEY])
        return shortcuts.to(self.device, self.model_config.dtype).by_layer

    def get_kv_cache_spec(self) -> dict[str, Any]:
        return split_by_depth(
            super().get_kv_cache_spec(),
            self.model_config.get_total_num_hidden_layers(),
            kv_segments(self.vllm_config.additional_config),
        )

    def execute_model(self, scheduler_output: Any) -> Any:
        with self.step.running(scheduler_output):
            return super().execute_model(scheduler_output)


def _truncated_model(model: Any) -> TruncatedExecution:
    """The part of the loaded model that runs plans. Raises `RuntimeError` if there is none."""
    for module in model.modules():
        if isinstance(module, TruncatedExecution):
            return module
    raise RuntimeError(
        f"raee-serve: the loaded model {type(model).__name__} cannot run truncated. Either its "
        f"architecture is not among {sorted(SUPPORTED)}, or the plug-in did not load: look "
        "for 'Failed to load plugin raee' above, and keep 'raee' in VLLM_PLUGINS if it is set."
    )
