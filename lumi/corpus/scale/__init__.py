"""`lumi prepare` in many tasks, on one machine or on a cluster: the same corpus as from one process.

Stages, each a set of tasks that leave files for the next one:

1. `reading`: each input file is read, cleaned, filtered and fingerprinted.
2. `sharing`: each row of keys (a band of the signatures, the exact hash) is sorted: who shares one with whom?
3. `deciding`: one pass in document order decides about duplicates and budgets, and where shards end.
4. `writing`: each shard is written, and then all are moved into the corpus folder.
"""
