"""GCS keeps the contract as far as that can be shown without Google: its client against an S3 server.

The emulator on PyPI does not answer what obstore's GCS client asks (gcp-storage-emulator: 501 to HEAD and to
`?list-type=2`). That client speaks Google's XML API, which is S3's for HEAD,
ranged GET under If-Match, and LIST. So the way of our store through that client is proven here, and not what Google's
servers answer beyond S3.
"""

from __future__ import annotations

from orchestra.testing.s3_server import S3Server
from orchestra.testing.under_store import ODD_KEYS
from tests.support.bucket_suite import BucketSuite


class TestGcs(BucketSuite):
    scheme = "gs"
    odd_keys = ODD_KEYS

    def options(self, server: S3Server) -> dict[str, str]:
        return {"base_url": server.endpoint, "bearer_token": "a-token"}
