// SPDX-License-Identifier: Apache-2.0
// The camera's dialog: what it sees, and a picture of it.

import { byId } from "./dom.js";
import { openDevice } from "./recorder.js";

const QUALITY = 0.92; // of JPEG

// Makes the dialog work; `taken(blob)` gets each picture.
export function startCamera(taken) {
  const dialog = byId("camera");
  const video = dialog.querySelector("video");
  const error = dialog.querySelector(".error");

  let turns = 0; // so far: who still waits for the camera knows whether it is its turn

  const stop = (stream) => {
    for (const track of stream?.getTracks() ?? []) track.stop();
  };

  byId("open-camera").addEventListener("click", async () => {
    error.textContent = "";
    byId("take").disabled = true;
    dialog.showModal();
    const turn = ++turns;
    const current = () => dialog.open && turn === turns;
    try {
      const stream = await openDevice({ video: { facingMode: { ideal: "environment" }, width: { ideal: 1280 } } });
      if (!current()) return stop(stream);
      video.srcObject = stream;
      await video.play();
      byId("take").disabled = false;
    } catch (problem) {
      if (current()) error.textContent = problem.message;
    }
  });

  byId("take").addEventListener("click", () => {
    const canvas = document.createElement("canvas");
    canvas.width = video.videoWidth;
    canvas.height = video.videoHeight;
    canvas.getContext("2d").drawImage(video, 0, 0);
    canvas.toBlob(taken, "image/jpeg", QUALITY);
    dialog.close();
  });

  byId("camera-close").addEventListener("click", () => dialog.close());
  dialog.addEventListener("close", () => {
    stop(video.srcObject); // Escape, too
    video.srcObject = null;
  });
}
