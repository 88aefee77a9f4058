"""Disturb a run again and again; it must end exactly as an undisturbed one did.

`make chaos KILLS=100 KIND=engine`, see docs/reliability.md.  The run (run.py), who strikes when
(campaign.py), and what there is to strike with: kills.py, stops.py, network.py, disk.py, clock.py.
"""
