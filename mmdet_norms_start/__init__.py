"""What runs before ``mmdet_norms``, and so before torch: only the standard library is imported here.

``hook.py`` runs at every start of Python, from ``mmdet_norms.pth`` in site-packages: it must cost next to nothing.
"""

bare = False
"""Whether ``import mmdet_norms`` is to leave out what needs other packages: the doctor's own start sets it."""


def module_asked_for(argv: list) -> tuple[str, list]:
    """Module and arguments of a process that was started as ``python -m MODULE ...``, of its ``sys.orig_argv``."""
    words = iter(argv[1:])
    for word in words:
        if word == '-m':
            return next(words, ''), list(words)
        if word in ('-X', '-W'):
            next(words, '')
        elif not word.startswith('-'):
            break
    return '', []


def doctor_is_asked_for(argv: list) -> bool:
    """Whether ``sys.orig_argv`` is ``python -m mmdet_norms.check_env ...`` or ``python -m mmdet_norms doctor ...``.

    Python imports the package before the module; what it needs may be broken, and the doctor is to say how.
    """
    module, arguments = module_asked_for(argv)
    return bare or module == 'mmdet_norms.check_env' or (module == 'mmdet_norms' and arguments[:1] == ['doctor'])
