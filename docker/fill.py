"""Fill the bucket of compose.yaml with the demo's pictures: 1,797 small PNG files and one object of four blocks.

    python fill.py http://s3:9000 BUCKET        ($AWS_ACCESS_KEY_ID and $AWS_SECRET_ACCESS_KEY: any, moto checks none)

Doing it again changes nothing: the objects are the same on every run.
"""

from __future__ import annotations

import os
import sys

import boto3
from botocore.config import Config

from orchestra.demo.dataset import objects


def main(endpoint: str, bucket: str) -> None:
    """Make the bucket and put every object."""
    s3 = boto3.client(
        "s3",
        endpoint_url=endpoint,
        region_name=os.environ.get("AWS_REGION", "us-east-1"),
        config=Config(retries={"max_attempts": 10, "mode": "standard"}),  # the server may still be starting
    )
    s3.create_bucket(Bucket=bucket)
    count = 0
    for key, data in objects():
        s3.put_object(Bucket=bucket, Key=key, Body=data)
        count += 1
    sys.stdout.write(f"{count} objects are in s3://{bucket}\n")


if __name__ == "__main__":
    main(*sys.argv[1:3])
