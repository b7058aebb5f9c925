"""Settings of nbgrader for the labs in source/: where they are, how long cells may run, what is left out."""

from pathlib import Path

c = get_config()  # noqa: F821 - nbgrader defines it

c.CourseDirectory.course_id = "replicate"
c.CourseDirectory.root = str(Path(__file__).resolve().parent)
# An endless loop is stopped after so many seconds, and the rest of the notebook still runs.
c.Execute.timeout = 60
c.ClearSolutions.code_stub = {
    "python": "# Write your answer here, in place of the next line.\nraise NotImplementedError()"
}
