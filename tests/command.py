"""Commands as users give them."""

from mpq_plugins.cli.parser import main


def run(capsys, *words):
    """Exit code, stdout and stderr of a command."""
    code = main([str(word) for word in words])
    captured = capsys.readouterr()
    return code, captured.out, captured.err
