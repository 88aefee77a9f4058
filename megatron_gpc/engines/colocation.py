"""Engines that share their GPUs with the policy (rollout.server.colocated) take turns with it.

    engines start -> rest -> [policy trains] -> take_weights -> weights are handed over
                      ^                                          -> take_cache -> samples are made
                      |__________________________________________________________________|

Cache comes last, so that the weights of policy and engine stand beside each other without it.
"""

from __future__ import annotations

import asyncio

from megatron_gpc.engines.fleet import Engine, Fleet, Memory


class Colocation:
    """Whose turn it is; called on the trainer's thread."""

    def __init__(self, fleet: Fleet):
        self.fleet = fleet

    def rest(self) -> None:
        """Have every engine give up its memory; one that does not is ended."""
        fleet = self.fleet
        fleet.asleep = True
        fleet.run(self._started())
        fleet.each(fleet.alive(), _release)
        for engine in fleet.engines:
            if engine.state == "down":
                assert engine.process is not None, "colocated engines are started by the run"
                engine.process.stop()
            else:
                engine.state = "stale"

    def take_weights(self) -> None:
        """Have the engines allocate their weights again, and start those that ended.

        Raises:
            ServerUnavailable: none answers in time.
        """
        self.fleet.asleep = False
        self.fleet.await_alive()
        self._resume("weights")

    def take_cache(self) -> None:
        """Have the engines allocate their cache again; the weights have been handed over."""
        self._resume("kv_cache")

    def _resume(self, memory: Memory) -> None:
        async def resume(engine: Engine) -> None:
            await engine.client.resume_memory(memory)
            engine.released.remove(memory)

        resting = [engine for engine in self.fleet.alive() if memory in engine.released]
        self.fleet.each(resting, resume)

    async def _started(self) -> None:
        """Wait for engines that are being started: they would take memory in the policy's turn."""
        await asyncio.gather(*(e.reviving for e in self.fleet.engines if e.reviving is not None))


async def _release(engine: Engine) -> None:
    await engine.client.release_memory()
    engine.released = {"weights", "kv_cache"}
