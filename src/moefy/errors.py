"""The one error of moefy, in a module of its own so that the command line has it without torch."""


class MoefyError(Exception):
    """A mistake of input, told in one sentence that says what is wrong and what to do."""
