"""Who listens to a run: audit log and log lines always; metrics, traces and dashboards where they are asked for.

Nothing of it leaves this machine by itself. Metrics are there to be fetched; traces and MLflow go where the
configuration and the environment name a place, and nowhere else.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from fedsecure.aggregator.audit_trail import AuditTrail
from fedsecure.aggregator.happenings import Happening, Listener, tell_all
from fedsecure.aggregator.log_lines import LogLines
from fedsecure.aggregator.metrics import Metrics
from fedsecure.audit_log import PURPOSE, AuditLog
from fedsecure.config import FederationConfig
from fedsecure.identity import keys
from fedsecure.identity.provision import Identity


@dataclass(slots=True)
class Listening:
    """One listener for all of them; :meth:`close` once the run has ended."""

    _tell: Listener
    _closers: list[Callable[[], None]] = field(default_factory=list)

    def __call__(self, happening: Happening) -> None:
        """Tell everybody, the audit log first; who fails is logged and keeps nobody else from hearing."""
        self._tell(happening)

    def close(self) -> None:
        """Send and write what is left, half a minute at most for each that sends."""
        for close in self._closers:
            close()


def listening(config: FederationConfig, identity: Identity, *, run: str, metrics: Metrics | None) -> Listening:
    """The listeners of one run.

    Args:
        run: its id, 32 hexadecimal digits.
        metrics: what answers on the operator's port, if anything does.

    Raises:
        EnvironmentProblem: FS-1816 an extra that ``[telemetry]`` needs is not installed; FS-1820 … FS-1822 the audit
            log cannot be written.
        ConfigError: FS-1041 traces without a place to go to.
    """
    key = identity.signing_key
    audit = AuditLog(config.state / "audit.log", sign=lambda body: keys.sign(key, PURPOSE, body))
    audit.head()  # a log that cannot be written ends the program here, and not in the middle of a run
    listeners: list[Listener] = [AuditTrail(audit), LogLines()]
    closers: list[Callable[[], None]] = []
    wanted = config.telemetry
    if metrics is not None:
        listeners.append(metrics)
    if wanted.otel:
        from fedsecure.aggregator.tracing import from_environment

        if traces := from_environment():
            listeners.append(traces)
            closers.append(traces.close)
    if wanted.tensorboard is not None:
        from fedsecure.aggregator.dashboards import TensorBoard

        board = TensorBoard(wanted.tensorboard, run)
        listeners.append(board)
        closers.append(board.close)
    if wanted.mlflow:
        from fedsecure.aggregator.dashboards import MLflow

        tracked = MLflow(wanted.mlflow, config.name)
        listeners.append(tracked)
        closers.append(tracked.close)
    return Listening(tell_all(listeners), closers)


__all__ = ["Listening", "listening"]
