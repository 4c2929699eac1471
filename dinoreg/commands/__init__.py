"""The commands of ``dinoreg``, a module each: ``add(commands)`` declares arguments; imports that take time wait until it runs."""
