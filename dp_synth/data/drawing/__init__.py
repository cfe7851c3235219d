"""Procedural pictures: families of random drawings, each a function ``(Canvas) -> Tensor``.

A family returns ``[n, 3, H, W]`` with values around 0..1; whoever makes bytes of it clips. Its
numbers come from general knowledge of pictures and from published papers, never from a data set.
"""
