"""A sink of your own: a line of text for every step, and a last one when the run ends.

log:
  sinks: [jsonl, tensorboard, sink.py:Diary]
  sinks_arguments: {Diary: {file: diary.txt}}
"""


class Diary:
    """Writes into a file of the run's folder; a message to a chat would look the same."""

    def __init__(self, run_dir, config, resume_step, file="diary.txt"):
        self.steps = config["train"]["steps"]
        self.file = (run_dir / file).open("a")
        self.say(f"the run goes on after step {resume_step}" if resume_step else "the run begins")

    def say(self, text):
        print(text, file=self.file, flush=True)

    def write(self, step, values):
        """Metrics of a training step, by their names in metrics.jsonl."""
        self.say(f"step {step} of {self.steps}: reward {values['reward']:.3f}")

    def write_evaluation(self, step, values):
        """The evaluation of the policy after `step` finished steps."""
        self.say(f"evaluated after step {step}: reward {values['eval_reward']:.3f}")

    def close(self, ok):
        """`ok` is False if the run ends by an error."""
        self.say("the run has ended" if ok else "the run has failed")
        self.file.close()
