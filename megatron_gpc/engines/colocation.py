"""Engines that share their GPUs with the policy (rollout.server.colocated) take turns with it.

    engines start -> rest -> [policy trains] -> take_weights -> weights are handed over
                      ^                                          -> take_cache -> samples are made
                      |__________________________________________________________________|

Cache comes last, so that the weights of policy and engine stand beside each other without it.
"""

from __future__ import annotations

import asyncio

from megatron_gpc.engines.fleet import Engine, Engines, Memory


class Turns:
    """Called on the trainer's thread."""

    def __init__(self, engines: Engines):
        self.engines = engines

    def rest(self) -> None:
        """Have every engine give up its memory; one that does not is ended."""
        engines = self.engines
        engines.asleep = True
        engines.run(self._started())
        engines.each(engines.alive(), _release)
        for engine in engines.engines:
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
        self.engines.asleep = False
        self.engines.await_alive()
        self._resume("weights")

    def take_cache(self) -> None:
        """Have the engines allocate their cache again; the weights have been handed over."""
        self._resume("kv_cache")

    def _resume(self, memory: Memory) -> None:
        async def resume(engine: Engine) -> None:
            await engine.client.resume_memory(memory)
            engine.released.remove(memory)

        resting = [engine for engine in self.engines.alive() if memory in engine.released]
        self.engines.each(resting, resume)

    async def _started(self) -> None:
        """Wait for engines that are being started: they would take memory in the policy's turn."""
        await asyncio.gather(*(e.reviving for e in self.engines.engines if e.reviving is not None))


async def _release(engine: Engine) -> None:
    await engine.client.release_memory()
    engine.released = {"weights", "kv_cache"}
