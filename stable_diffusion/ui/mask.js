/**
 * The mask: painted over an image with mouse, finger or pen, or by numbers; read as a PNG, white where it is painted.
 * Knows nothing of the image below it but its size.
 */

const LONGEST_SIDE = 1024; // the server generates nothing larger

export function openMask(canvas) {
  const context = canvas.getContext("2d", { willReadFrequently: true });
  let size = 0.15; // of the shorter side
  let isErasing = false;
  let last = null;

  const changed = () => {
    canvas.setAttribute("aria-label", `Mask: ${Math.round(100 * painted())} % of the image is painted`);
  };
  const painted = () => {
    const { data } = context.getImageData(0, 0, canvas.width, canvas.height);
    let sum = 0;
    for (let i = 3; i < data.length; i += 4) sum += data[i];
    return sum / 255 / (data.length / 4);
  };
  const rectangle = (left, top, right, bottom) => {
    context.globalCompositeOperation = "source-over";
    const { width, height } = canvas;
    context.fillRect(left * width, top * height, (right - left) * width, (bottom - top) * height);
  };
  const stroke = (from, to) => {
    context.globalCompositeOperation = isErasing ? "destination-out" : "source-over";
    context.lineWidth = Math.max(1, size * Math.min(canvas.width, canvas.height));
    context.beginPath();
    context.moveTo(from.x, from.y);
    context.lineTo(to.x, to.y);
    context.stroke();
    context.beginPath(); // a line without length is not drawn
    context.arc(to.x, to.y, context.lineWidth / 2, 0, 2 * Math.PI);
    context.fill();
  };
  const place = (event) => {
    const box = canvas.getBoundingClientRect();
    return { x: ((event.clientX - box.left) / box.width) * canvas.width, y: ((event.clientY - box.top) / box.height) * canvas.height };
  };

  canvas.addEventListener("pointerdown", (event) => {
    if (!event.isPrimary || event.button !== 0) return;
    event.preventDefault();
    canvas.setPointerCapture(event.pointerId);
    last = place(event);
    stroke(last, last);
  });
  canvas.addEventListener("pointermove", (event) => {
    if (!last || !event.isPrimary) return;
    const passed = event.getCoalescedEvents?.() ?? [];
    for (const one of passed.length ? passed : [event]) {
      const next = place(one);
      stroke(last, next);
      last = next;
    }
  });
  const lift = (event) => {
    if (!last || !event.isPrimary) return;
    last = null;
    changed();
  };
  canvas.addEventListener("pointerup", lift);
  canvas.addEventListener("pointercancel", lift);

  return {
    /** Empty, for an image of this size. */
    reset(width, height) {
      const scale = Math.min(1, LONGEST_SIDE / Math.max(width, height));
      canvas.width = Math.max(1, Math.round(width * scale));
      canvas.height = Math.max(1, Math.round(height * scale));
      context.lineCap = "round";
      context.fillStyle = context.strokeStyle = "#ff2d9b";
      changed();
    },
    /** `share` of the shorter side, 0 to 1. */
    setBrush: (share) => { size = share; },
    setErasing: (on) => { isErasing = on; },
    isEmpty: () => painted() === 0,
    /** Edges as shares of the sides, 0 to 1. */
    paintRectangle(left, top, right, bottom) {
      rectangle(left, top, right, bottom);
      changed();
    },
    clear() {
      context.clearRect(0, 0, canvas.width, canvas.height);
      changed();
    },
    toBlob() {
      const whole = likeThis();
      const white = likeThis();
      white.drawImage(canvas, 0, 0);
      white.globalCompositeOperation = "source-in";
      white.fillStyle = "white";
      white.fillRect(0, 0, canvas.width, canvas.height);
      whole.fillRect(0, 0, canvas.width, canvas.height); // black
      whole.drawImage(white.canvas, 0, 0);
      return new Promise((resolve) => whole.canvas.toBlob(resolve, "image/png"));
    },
    /** What `toBlob` has made, painted again. */
    async load(blob) {
      const bitmap = await createImageBitmap(blob);
      const grey = likeThis();
      grey.drawImage(bitmap, 0, 0, canvas.width, canvas.height);
      const pixels = grey.getImageData(0, 0, canvas.width, canvas.height);
      for (let i = 0; i < pixels.data.length; i += 4) pixels.data[i + 3] = pixels.data[i];
      grey.putImageData(pixels, 0, 0);
      context.globalCompositeOperation = "source-over";
      rectangle(0, 0, 1, 1);
      context.globalCompositeOperation = "destination-in";
      context.drawImage(grey.canvas, 0, 0);
      changed();
    },
  };

  function likeThis() {
    const other = document.createElement("canvas");
    other.width = canvas.width;
    other.height = canvas.height;
    return other.getContext("2d");
  }
}
