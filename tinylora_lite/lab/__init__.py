"""The lab: the paper's claims, tested in miniature with seeds, intervals and controls (``tinylora lab``).

A claim (:mod:`tinylora_lite.lab.claims`, a file for each) names the runs that test it. ``plan`` says which of them are
missing, ``running`` makes them, ``store`` keeps a record of each, and the claim draws its figure and gives its verdict
from the records.
"""
