"""``rlhf-fast label``: people compare responses on a page, and their labels become training data.

``items`` is what they see, ``store`` the file of their answers, ``consensus`` what several of them come to, ``exchange`` the
formats of Argilla and Label Studio, ``app`` the server of the page, and ``page`` the page.
"""
