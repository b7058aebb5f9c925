"""Settings of nbgrader for the labs in source/: where they are, how long cells may run, what is left out."""

import logging
import warnings
from pathlib import Path

from sqlalchemy.exc import SAWarning

c = get_config()  # noqa: F821 - nbgrader defines it

c.CourseDirectory.course_id = "replicate"
c.CourseDirectory.root = str(Path(__file__).resolve().parent)
# An endless loop is stopped after so many seconds, and the rest of the notebook still runs.
c.Execute.timeout = 60
# A kernel that is asked to end may print an error of its own while it does.
c.Execute.shutdown_kernel = "immediate"
c.ClearSolutions.code_stub = {
    "python": "# Write your answer here, in place of the next line.\nraise NotImplementedError()"
}

# Two kinds of warnings that come with every notebook and ask for nothing: about nbgrader's own use of its
# database, and that cells with hidden tests are not as they were handed out. (nbgrader restores all tests.)
warnings.filterwarnings("ignore", category=SAWarning)
logging.getLogger("AutogradeApp").addFilter(lambda record: "Attribute 'checksum'" not in record.getMessage())
