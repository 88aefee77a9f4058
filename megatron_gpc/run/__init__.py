"""A run as processes: its folder, its ranks, how it is stopped and watched."""
