"""Whether the command starts, and does not know yet what to do.

While `now` is true, `import moefy` brings no more than the package itself (see its __init__.py).
"""

now = False
