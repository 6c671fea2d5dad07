"""Errors of sqcompile: each message names what went wrong and what to do about it."""


class SQCompileError(RuntimeError):
    """Base class; catching it catches everything sqcompile raises on purpose."""


class RecipeError(SQCompileError, ValueError):
    """A recipe that does not exist or contradicts itself."""


class CaptureError(SQCompileError):
    """The model cannot be captured as a graph, or is called unlike it was captured."""


class IndexRangeError(SQCompileError, IndexError):
    """A compiled model is called with an index, such as a token's id, that its table does not have."""


class CalibrationError(SQCompileError):
    """The calibration data is empty, refused by the model, not of it, or gives non-finite activations."""


class EvaluationError(SQCompileError, ValueError):
    """Data that a model cannot be evaluated on, or two models that cannot be compared."""


class GenerationError(SQCompileError, ValueError):
    """A setting, a model or a prompt that `sqcompile.generate` does not take."""


class NothingToQuantizeError(SQCompileError):
    """No linear of the model can be quantized under the recipe."""


class WeightError(SQCompileError, ValueError):
    """A parameter that holds a NaN or an infinity."""


class PlanError(SQCompileError):
    """A plan that is wrong, does not belong to the model or what is passed beside it, or cannot be read or written."""


class ArtifactError(SQCompileError):
    """A saved model or a checkpoint that cannot be read or written, is damaged, or holds what sqcompile does not run."""


class FormatError(ArtifactError):
    """A format cannot hold a model or a plan, however often it is tried."""


class StageError(SQCompileError):
    """A stage of the pipeline cannot be shown or left the graph language."""


class DrawError(SQCompileError, ValueError):
    """A drawing in a format there is none for, or at a path that cannot be written."""


class ReportError(SQCompileError, ValueError):
    """The page of a report that cannot be made or written, or a plot of what a plan does not know."""


class InternalError(SQCompileError):
    """A fault of sqcompile itself, such as a rule that fails on a layout. Nothing was changed; please report the message."""


def first_line(error: BaseException) -> str:
    """What an error says at first."""
    text = str(error).strip()
    return text.splitlines()[0].rstrip(".") if text else type(error).__name__
