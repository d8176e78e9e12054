"""Every error this package raises on purpose, and the warnings it gives.

MPQError
├── PrecisionError            (ValueError)    a bit-width that no quantizer here can have
├── ModelError                (ValueError)    the model cannot be run, loaded, or read
│   └── UnknownLayerError     (KeyError)      a layer name or pattern that matches nothing
├── DataError                 (ValueError)    batches are missing, unlabelled or not finite
├── SpaceError                (ValueError)    pins, ties and menus contradict each other
├── BudgetError               (ValueError)    a budget that cannot be read
│   └── InfeasibleBudgetError                 a budget below the least the space can reach
├── SolverError               (RuntimeError)  a solver gave up, or its answer did not check out
├── FormatError               (ValueError)    a file of ours that is damaged or not ours
│   └── FingerprintError                      a bit configuration made for another model
├── WriteError                (OSError)       a file cannot be written
├── PluginError               (LookupError)   a proxy, cost, solver or adapter nobody registered
├── MissingExtraError         (ImportError)   an optional dependency is not installed
├── AdapterError              (ValueError)    the framework cannot do what was asked
├── TrainingError             (RuntimeError)  training cannot begin, or cannot go on
├── VerificationError         (RuntimeError)  an artifact does not hold what was asked for
└── UsageError                (ValueError)    a command line or a file of options that makes no sense

FloatLayersWarning            (UserWarning)   a part of the model that is worth telling stays in float
FewImagesWarning              (UserWarning)   a score measured on too few images to mean much
"""


class MPQError(Exception):
    """Base of all errors raised on purpose; its text states the fact, the values and the next step."""

    def __str__(self) -> str:  # KeyError would print the repr of its text.
        return str(self.args[0]) if self.args else ""


class PrecisionError(MPQError, ValueError):
    """A bit-width outside what a quantizer can have."""


class ModelError(MPQError, ValueError):
    """The model cannot be loaded, run, or understood."""


class UnknownLayerError(ModelError, KeyError):
    """A layer name or pattern matches no layer of the model."""


class DataError(MPQError, ValueError):
    """Batches are missing, unlabelled, or hold values that are not finite."""


class SpaceError(MPQError, ValueError):
    """Pins, ties, menus and refusals leave some unit without a choice."""


class BudgetError(MPQError, ValueError):
    """A budget that cannot be read."""


class InfeasibleBudgetError(BudgetError):
    """A budget that even the cheapest choices do not meet."""


class SolverError(MPQError, RuntimeError):
    """A solver found no answer, or one that its own tables contradict."""


class FormatError(MPQError, ValueError):
    """A file that is damaged, of another format, or holds keys nobody knows."""


class FingerprintError(FormatError):
    """A bit configuration that was made for another model."""


class WriteError(MPQError, OSError):
    """A file that cannot be written where it was asked for."""


class PluginError(MPQError, LookupError):
    """A name that no plugin is registered under."""


class MissingExtraError(MPQError, ImportError):
    """An optional dependency that is needed now and is not installed."""


class AdapterError(MPQError, ValueError):
    """A framework cannot do what it was asked to."""


class TrainingError(MPQError, RuntimeError):
    """Training cannot be set up as asked, or its loss is no longer a number."""


class VerificationError(MPQError, RuntimeError):
    """An exported artifact differs from what was asked for."""


class UsageError(MPQError, ValueError):
    """A command line, or a file of its options, that makes no sense."""


class FloatLayersWarning(UserWarning):
    """A part of the model that is worth telling stays in float, outside every budget."""


class FewImagesWarning(UserWarning):
    """A score is measured on so few images that it says little."""
