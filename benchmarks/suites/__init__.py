"""Suites of experiments, which ask how good results are; those of speed are in ``dsd_fast/bench/suites``.

They need a checkout: no wheel has them. Their lines stand in the registry beside those of speed.
"""
