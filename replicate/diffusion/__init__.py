"""Images and video: a small diffusion transformer with the method's FFN, on glyphs that it draws itself.

Read `model.py` first. Beside the method, which does not import it.
"""
