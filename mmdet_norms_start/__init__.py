"""What runs before ``mmdet_norms``, and so before torch: only the standard library is imported here.

``hook.py`` runs at every start of Python, from ``mmdet_norms.pth`` in site-packages: it must cost next to nothing.
"""


def doctor_is_asked_for(argv: list) -> bool:
    """Whether the command line of a process (``sys.orig_argv``) is ``python -m mmdet_norms.check_env ...``.

    Python imports the package before the module; what it needs may be broken, and the doctor is to say how.
    """
    words = iter(argv[1:])
    for word in words:
        if word == '-m':
            return next(words, '') == 'mmdet_norms.check_env'
        if word in ('-X', '-W'):
            next(words, '')
        elif not word.startswith('-'):
            return False
    return False
