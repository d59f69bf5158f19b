/**
 * Turns a file that somebody has chosen into the image that is sent, which is the image that the page shows. Knows nothing of the page.
 *
 * Browsers and servers follow different notes about orientation (Chromium ignores a WebP's EXIF and all XMP), forgive different
 * damage, and read different kinds. So a file goes out as it is only where nothing in it can be read in two ways; otherwise its
 * pixels go out as this browser shows them, without any note.
 */

import { isMarkup, isPlain, kindOf } from "./file.js";

// What is larger is scaled down here: no detail that counts is lost, a phone sends it sooner, and the history can keep it.
const MAX_BYTES = 4 * 2 ** 20;
const LONGEST_SIDE = 2048;
const SHOWN_EVERYWHERE = ["PNG", "JPEG", "WebP", "GIF"];

/** Returns {blob, width, height}: upright, in pixels. Raises an Error whose message says what is wrong with `file` (a Blob). */
export async function prepareUpload(file) {
  const bytes = await bytesOf(file);
  const image = await decoded(bytes);
  const { width, height } = image;
  const mayGoAsItIs = bytes.length <= MAX_BYTES && Math.max(width, height) <= 2 * LONGEST_SIDE && isPlain(bytes);
  return mayGoAsItIs ? { blob: new Blob([bytes], { type: `image/${kindOf(bytes).toLowerCase()}` }), width, height } : redrawn(image);
}

async function bytesOf(file) {
  let content;
  try {
    content = await file.arrayBuffer();
  } catch {
    throw new Error("This file cannot be read. Has it been moved or changed? Choose it again.");
  }
  if (content.byteLength === 0) throw new Error("This file is empty. Choose another one.");
  return new Uint8Array(content);
}

/** An ImageBitmap, or an <img> of an SVG: a bitmap is refused where a file is cut short, of which an <img> shows the rest as nothing. */
async function decoded(bytes) {
  try {
    return isMarkup(bytes) ? await svgImage(bytes) : await createImageBitmap(new Blob([bytes]));
  } catch {
    throw new Error(notShown(kindOf(bytes)));
  }
}

/** createImageBitmap reads no SVG. One that does not say how large it is gets a size from some browsers. */
async function svgImage(bytes) {
  const url = URL.createObjectURL(new Blob([bytes], { type: "image/svg+xml" }));
  const image = new Image();
  image.src = url;
  try {
    await image.decode();
  } finally {
    URL.revokeObjectURL(url);
  }
  if (!image.width || !image.height) throw new Error("it has no size");
  return image;
}

function notShown(kind) {
  if (kind === null) return "This file is not an image that this browser can show. Choose a PNG, JPEG or WebP file.";
  if (SHOWN_EVERYWHERE.includes(kind)) return `This ${kind} file is damaged or cut short. Choose another one.`;
  return `This browser cannot show this file, which is ${kind}. Convert it to PNG or JPEG and choose that.`;
}

/**
 * The pixels as this browser shows them, over white as the server does it. A canvas is sRGB: the browser converts colours of other
 * profiles (Display P3, Adobe RGB) to it, and what lies outside sRGB is clipped. The model's images are sRGB too.
 */
async function redrawn(image) {
  const scale = Math.min(1, LONGEST_SIDE / Math.max(image.width, image.height));
  const canvas = document.createElement("canvas");
  canvas.width = Math.max(1, Math.round(image.width * scale));
  canvas.height = Math.max(1, Math.round(image.height * scale));
  const context = canvas.getContext("2d");
  context.imageSmoothingQuality = "high";
  context.fillStyle = "white";
  context.fillRect(0, 0, canvas.width, canvas.height);
  context.drawImage(image, 0, 0, canvas.width, canvas.height);
  const png = await encoded(canvas, "image/png");
  const blob = png.size <= MAX_BYTES ? png : await encoded(canvas, "image/jpeg"); // a large photo as PNG has up to 12 MiB
  return { blob, width: canvas.width, height: canvas.height };
}

/** Not possible where a browser has no memory for it, or keeps the page from reading an SVG's pixels. */
async function encoded(canvas, type) {
  const blob = await new Promise((resolve) => canvas.toBlob(resolve, type, 0.95)).catch(() => null);
  if (!blob) throw new Error("This browser could not convert the image: Convert it to PNG with another program and choose that.");
  return blob;
}
