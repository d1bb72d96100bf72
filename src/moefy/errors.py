"""The errors of moefy and its one warning, apart from the rest: the command line has them without torch."""


class MoefyError(Exception):
    """A mistake of input, told in one sentence that says what is wrong and what to do."""


class RecipeError(MoefyError):
    """A recipe that is not valid, or does not fit a model."""


class MoefyWarning(UserWarning):
    """What a user may want to change, in one sentence; the command line shows it as it shows a mistake."""
